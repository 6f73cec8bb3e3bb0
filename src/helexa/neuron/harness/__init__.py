"""Harnesses by name. Only the harness that is named is imported, and only a host process lets it import its engine."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Final

from helexa.neuron.harness.base import Harness

KNOWN: Final = {
    "llama": "helexa.neuron.harness.llama:LlamaHarness",
    "torch": "helexa.neuron.harness.torch:TorchHarness",
}


def open_harness(name: str) -> Harness:
    """A harness by its short name, or any class by "module:Class". ValueError where there is none."""
    module_name, _, class_name = KNOWN.get(name, name).partition(":")
    try:
        harness: Harness = getattr(importlib.import_module(module_name), class_name)()
    except (ImportError, AttributeError, ValueError) as err:
        raise ValueError(f'there is no harness "{name}"; known: {", ".join(KNOWN)}, or "module:Class" ({err})') from err
    return harness


def formats_of(harnesses: Iterable[Harness]) -> tuple[str, ...]:
    """Of the files that those harnesses serve which can run here, in their order; of all where none can."""
    harnesses = list(harnesses)
    usable = [harness for harness in harnesses if harness.why_not() is None]
    return tuple(dict.fromkeys(harness.format for harness in usable or harnesses))


def reference(harness: Harness) -> str:
    """How another process is told to open this harness."""
    return f"{type(harness).__module__}:{type(harness).__qualname__}"
