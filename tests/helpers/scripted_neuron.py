"""The `neuron` program with the scripted harness for its only one: `python -m tests.helpers.scripted_neuron serve`."""

from __future__ import annotations

from helexa.neuron import cli, harness

if __name__ == "__main__":
    harness.KNOWN.clear()
    harness.KNOWN["scripted"] = "tests.helpers.scripted:ScriptedHarness"
    cli.main()
