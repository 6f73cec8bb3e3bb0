"""A node's embeddings as Ollama's. Pure: the numbers pass as the node wrote them."""

from __future__ import annotations

from typing import Any

import msgspec

from helexa.core.bodies import NOT_JSON
from helexa.core.dialects import neuron_chat as chat
from helexa.core.dialects.neuron_stream import Witness
from helexa.core.dialects.ollama_stream import Clocks
from helexa.core.errors import UpstreamError

_encode = msgspec.json.Encoder().encode


class _Embedding(msgspec.Struct):
    embedding: msgspec.Raw
    index: int = 0


class _Answer(msgspec.Struct):
    data: list[_Embedding]
    usage: chat.Usage | None = None


_decode = msgspec.json.Decoder(_Answer).decode


class Embeddings:
    """A Mend. one: for /api/embeddings, which has one text and answers one list."""

    def __init__(self, *, model: str, one: bool, clocks: Clocks, witness: Witness | None = None) -> None:
        self._model = model
        self._one = one
        self._clocks = clocks
        self._witness = witness
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        self._parts.append(data)
        return b""

    def finish(self) -> bytes:
        try:
            answer = _decode(b"".join(self._parts))
        except NOT_JSON as err:
            raise UpstreamError(f"the node's answer is none of embeddings: {err}") from None
        found = [entry.embedding for entry in sorted(answer.data, key=lambda entry: entry.index)]
        if self._witness is not None:
            self._witness.ended(answer.usage, None, None)
        if self._one:
            return _encode({"embedding": found[0] if found else []})
        return embeddings(self._model, found, self._clocks, answer.usage)


def embeddings(model: str, found: list[msgspec.Raw], clocks: Clocks, usage: chat.Usage | None = None) -> bytes:
    """The answer of /api/embed."""
    answer: dict[str, Any] = {
        "model": model,
        "embeddings": found,
        "total_duration": round((clocks.now() - clocks.started) * 1e9),
        "load_duration": round((clocks.sent - clocks.started) * 1e9),
    }
    if usage is not None:
        answer["prompt_eval_count"] = usage.prompt_tokens
    return _encode(answer)
