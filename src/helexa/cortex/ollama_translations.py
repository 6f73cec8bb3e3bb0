"""Ollama's endpoints where they meet an exchange: what a node is asked, and what turns its answer.

The translating itself is pure and lives in core.dialects.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import ClassVar

from helexa.core.dialects import ollama_request as request
from helexa.core.dialects.node_errors import Naming
from helexa.core.dialects.ollama_embeddings import Embeddings, embeddings
from helexa.core.dialects.ollama_request import Translation
from helexa.core.dialects.ollama_stream import Answer, Clocks, Lines, Sink, Whole, loaded
from helexa.core.lifecycle import ModelInfo
from helexa.core.relay.contract import Exchange, Mend, Reply
from helexa.cortex.translated import Setup, Translated, Witness

NDJSON = b"application/x-ndjson"
JSON = b"application/json"


class _Ollama(Translated):
    unloaded = "stop"  # Ollama says "unload" of what is gone, which this is not

    def __init__(self, exchange: Exchange, context: int | None, setup: Setup) -> None:
        self.asked = self.read(exchange.body)
        self.asked.check_context(exchange.model, context)
        self._model = exchange.model
        exchange.headers_back = self.asked.dropped_header

    @staticmethod
    @abstractmethod
    def read(body: bytes) -> Translation: ...

    @property
    def naming(self) -> Naming:
        return request.naming

    def body(self, model: str) -> bytes:
        return self.asked.body(model)

    def ask(self, info: ModelInfo) -> tuple[str | None, bytes]:
        asked = self.asked
        if info.limits is not None:
            asked.check_context(self._model, info.limits.context)
        if asked.plain is not None and info.task == "completion":
            return request.COMPLETIONS, asked.as_completion(info.id, self._model)
        return asked.path, asked.body(info.id)

    def reply(self, exchange: Exchange, *, is_loaded: bool) -> Reply | None:
        load = self.asked.load
        if load is None or (load == "load" and not is_loaded):
            return None
        return self._done(exchange, load)

    @abstractmethod
    def _done(self, exchange: Exchange, load: str) -> Reply: ...


class _Generated(_Ollama):
    is_chat: ClassVar[bool]

    def answer(self, exchange: Exchange) -> Mend:
        clocks = _clocks(exchange)
        form: type[Lines | Whole] = Lines if exchange.stream else Whole
        sink: Sink = form(model=exchange.model, is_chat=self.is_chat, clocks=clocks)
        return Answer(sink, clocks, witness=Witness(exchange))

    def content_type(self, exchange: Exchange) -> bytes:
        return NDJSON if exchange.stream else JSON

    def _done(self, exchange: Exchange, load: str) -> Reply:
        reason = load if load == "load" else self.unloaded
        clocks, stream = _clocks(exchange), exchange.stream
        body = loaded(exchange.model, reason, is_chat=self.is_chat, clocks=clocks, stream=stream)
        return Reply(body, self.content_type(exchange))


class Chat(_Generated):
    """POST /api/chat."""

    read = staticmethod(request.chat)
    is_chat = True


class Generate(_Generated):
    """POST /api/generate."""

    read = staticmethod(request.generate)
    is_chat = False


class Embed(_Ollama):
    """POST /api/embed."""

    read = staticmethod(request.embed)
    one = False

    def answer(self, exchange: Exchange) -> Mend:
        return Embeddings(model=exchange.model, one=self.one, clocks=_clocks(exchange), witness=Witness(exchange))

    def content_type(self, exchange: Exchange) -> bytes:
        return JSON

    def _done(self, exchange: Exchange, load: str) -> Reply:
        return Reply(b'{"embedding":[]}' if self.one else embeddings(exchange.model, [], _clocks(exchange)))


class EmbedOne(Embed):
    """POST /api/embeddings."""

    read = staticmethod(request.embeddings)
    one = True


def _clocks(exchange: Exchange) -> Clocks:
    """Made when a node is asked."""
    return Clocks(started=exchange.t_start, sent=time.monotonic(), now=time.monotonic, wall=time.time)
