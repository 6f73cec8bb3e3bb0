"""A trace: who asked for which model when, one JSON object a line, in order of time. Never a word of a prompt.

{"t": 12.5, "model": "qwen", "prompt_tokens": 812, "output_tokens": 140, "prefix": [91, 17]}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec


class Request(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """t: seconds since the trace began. prefix: ids of the prompt's prefixes, the shortest first, where recorded."""

    t: float
    model: str
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix: Sequence[int] = ()


class BadTrace(Exception):
    """str() says which line and why."""


def read(path: Path) -> list[Request]:
    decoder = msgspec.json.Decoder(Request)
    found: list[Request] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                request = decoder.decode(line)
            except msgspec.MsgspecError as err:
                raise BadTrace(f"{path}:{number}: {err}") from err
            if found and request.t < found[-1].t:
                raise BadTrace(f"{path}:{number}: t = {request.t} is before the line above it ({found[-1].t})")
            found.append(request)
    return found


def write(path: Path, requests: Iterable[Request]) -> None:
    encoder = msgspec.json.Encoder()
    with path.open("wb") as out:
        for request in requests:
            out.write(encoder.encode(request) + b"\n")
