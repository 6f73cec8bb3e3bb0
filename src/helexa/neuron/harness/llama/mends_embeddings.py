"""Embeddings cut to fewer dimensions, for models that were trained to bear it (Matryoshka). Pure."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder().encode


class Cut:
    """The Mend of an embedding answer: the first `dimensions` numbers of each, of length 1 again as the whole was."""

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        self._parts.append(data)
        return b""

    def finish(self) -> bytes:
        answer = _decode(b"".join(self._parts))
        for entry in answer["data"]:
            entry["embedding"] = self._cut(entry["embedding"])
        return _encode(answer)

    def _cut(self, embedding: str | list[float]) -> str | list[float]:
        if isinstance(embedding, list):
            return _unit(embedding[: self._dimensions])
        raw = base64.b64decode(embedding)[: 4 * self._dimensions]
        count = len(raw) // 4
        return base64.b64encode(struct.pack(f"<{count}f", *_unit(struct.unpack(f"<{count}f", raw)))).decode()


def _unit(vector: Sequence[float]) -> list[float]:
    length = math.hypot(*vector)
    return [x / length for x in vector] if length else list(vector)
