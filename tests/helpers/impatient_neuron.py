"""The `neuron` program with a watchdog that waits for a second where ours waits for thirty:
`python -m tests.helpers.impatient_neuron serve`."""

from __future__ import annotations

from helexa.neuron import cli, step_watch

if __name__ == "__main__":
    step_watch.LEAST_S = 1.0  # type: ignore[misc]
    cli.main()
