"""A trace: which model was asked for when, one JSON object a line. Never a word of a prompt.

{"t": 12.5, "model": "qwen", "prompt_tokens": 812, "output_tokens": 140, "prefix": [91, 17], "ends": [300, 790]}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec


class Request(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """t: seconds since the trace began, or since 1970. prefix: ids of the prompt's prefixes, the shortest first, where
    recorded; ends: the tokens up to the end of each, evenly spread where they are not."""

    t: float
    model: str
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix: Sequence[int] = ()
    ends: Sequence[int] = ()

    @property
    def marks(self) -> Sequence[int]:
        """`ends`, whether recorded or not."""
        count = len(self.prefix)
        if len(self.ends) == count:
            return self.ends
        return [self.prompt_tokens * (at + 1) // count for at in range(count)]


class BadTrace(Exception):
    """str() says which line and why."""


_EPOCH: Final = 1e8  # a trace of three years would be a long one


def read(path: Path) -> list[Request]:
    """In order of time, which the lines need not be (a gateway writes a request down when it ends); the first at 0
    where times are since 1970. Raises BadTrace."""
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
            found.append(request)
    found.sort(key=lambda request: request.t)
    if found and found[0].t >= _EPOCH:
        begin = found[0].t
        found = [msgspec.structs.replace(request, t=request.t - begin) for request in found]
    return found


def write(path: Path, requests: Iterable[Request]) -> None:
    encoder = msgspec.json.Encoder(enc_hook=list)  # a generated prefix is a range
    with path.open("wb") as out:
        for request in requests:
            out.write(encoder.encode(request) + b"\n")
