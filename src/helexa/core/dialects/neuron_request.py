"""A request of another dialect as the neuron's chat body. Pure: bytes in, bytes out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

MAX_TOKENS: Final = 2**31 - 1  # what engines count in

_UNPRINTABLE: Final = re.compile(r"[^A-Za-z0-9_.-]")
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Options:
    """keep_changing_blocks: leave in the prompt what changes with every request (Claude Code's billing header).
    refuse_hosted_tools:  400 for tools that only the dialect's vendor can run, in place of leaving them out."""

    keep_changing_blocks: bool = False
    refuse_hosted_tools: bool = False


@dataclass(frozen=True, slots=True)
class ChatBody:
    """fields:   the chat body without its `model`, from the first comma on
    dropped:  what the answer was made without, by name, for `x-helexa-dropped`
    """

    fields: bytes
    dropped: tuple[str, ...]

    def body(self, model: str) -> bytes:
        """The chat body for a node that calls the model so."""
        return b'{"model":' + _encode(model) + self.fields

    @property
    def dropped_header(self) -> bytes:
        return dropped_line(self.dropped)


def dropped_line(dropped: Sequence[str]) -> bytes:
    """The header line for the client, CRLF included; empty where nothing was dropped."""
    if not dropped:
        return b""
    names = [_UNPRINTABLE.sub("_", name)[:64] for name in dropped]
    return b"x-helexa-dropped: " + ", ".join(names).encode()[:2048] + b"\r\n"
