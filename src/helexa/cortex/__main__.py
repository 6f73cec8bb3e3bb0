"""`python -m helexa.cortex` is the `cortex` program: how `cortex up` starts its own kind without a PATH."""

from helexa.cortex.cli import main

main()
