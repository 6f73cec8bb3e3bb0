"""`python -m helexa.neuron` is the `neuron` program: how the daemon starts its own kind without a PATH."""

from helexa.neuron.cli import main

main()
