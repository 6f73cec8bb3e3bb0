"""Filling in between a prompt and a suffix: the tokens that a model was trained with for it. Pure.

A header names them in few files, and the engine's own endpoint for it cuts a long prompt to a batch. So the spellings
that there are get tried on the model's tokenizer once it is loaded: where all three are one token each, it has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Marks:
    """What stands before the prompt, before the suffix, and where the model goes on."""

    prefix: str
    suffix: str
    middle: str

    def prompt(self, before: str, after: str) -> str:
        return f"{self.prefix}{before}{self.suffix}{after}{self.middle}"


KNOWN: Final = (
    Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    Marks("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    Marks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    Marks("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    Marks("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
)


def probes() -> Iterator[tuple[Marks, str]]:
    """Marks, and the text that is three tokens where a model has them."""
    for marks in KNOWN:
        yield marks, marks.prompt("", "")


def has(tokens: Sequence[object]) -> bool:
    """The tokens of a probe, read with special tokens and without any added."""
    return len(tokens) == 3
