"""How a model says what is not plain text: which parser reads it, and which grammar holds it to a call. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from helexa.neuron.harness import openai_fields as fields
from helexa.neuron.harness.torch.chunks import Parser
from helexa.neuron.harness.torch.pieces import Content, Piece
from helexa.neuron.harness.torch.request import Grammar


@dataclass(frozen=True, slots=True)
class Speech:
    """parser: a new one for each choice, from the answer's id and the choice's index."""

    parser: Callable[[str, int], Parser]
    grammar: Grammar | None = None
    special_text: bool = False


class Plain:
    """All of it is text."""

    def feed(self, text: str) -> Sequence[Piece]:
        return [Content(text)] if text else []

    def end(self) -> Sequence[Piece]:
        return []


def speech_for(template: Any, asked: fields.ChatRequest) -> Speech:
    return Speech(lambda answer_id, index: Plain())
