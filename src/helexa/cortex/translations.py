"""Dialects that nodes do not speak: the chat body that a node is asked with, and the machine that turns its answer.

The translating itself is pure and lives in core.dialects; here it meets an exchange.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from secrets import token_hex
from typing import Final

from helexa.core.dialects import (
    anthropic_errors,
    anthropic_request,
    responses_input,
    responses_items,
    responses_request,
    responses_wire,
)
from helexa.core.dialects.anthropic_sinks import EventWriter, MessageBuilder
from helexa.core.dialects.anthropic_stream import Answer, Sink
from helexa.core.dialects.node_errors import Naming
from helexa.core.dialects.responses_document import Document
from helexa.core.dialects.responses_sinks import EventWriter as ResponseEvents
from helexa.core.dialects.responses_sinks import ResponseBuilder
from helexa.core.dialects.responses_stream import Answer as ResponseAnswer
from helexa.core.errors import HelexaError
from helexa.core.relay.contract import Exchange, Mend
from helexa.cortex import ollama_translations as ollama
from helexa.cortex.response_store import (
    Record,
    chain,
    conversation,
    find_item,
    not_found,
    owner_of,
)
from helexa.cortex.translated import Setup, Translated, Witness


class Messages(Translated):
    """POST /v1/messages."""

    @property
    def naming(self) -> Naming:
        return anthropic_errors.naming

    def __init__(self, exchange: Exchange, context: int | None, setup: Setup) -> None:
        self._asked = anthropic_request.translate(exchange.body, context=context, options=setup.options)
        exchange.headers_back = self._asked.dropped_header

    def body(self, model: str) -> bytes:
        return self._asked.body(model)

    def answer(self, exchange: Exchange) -> Mend | None:
        message_id = f"msg_{exchange.request_id}"
        form: type[EventWriter | MessageBuilder] = EventWriter if exchange.stream else MessageBuilder
        sink: Sink = form(message_id=message_id, model=exchange.model)
        return Answer(
            sink,
            message_id=message_id,
            max_tokens=self._asked.max_tokens,
            show_thinking=self._asked.show_thinking,
            witness=Witness(exchange),
        )


class Count(Translated):
    """POST /v1/messages/count_tokens: the prompt is rendered as that of the request itself would be."""

    @property
    def naming(self) -> Naming:
        return anthropic_errors.naming

    def __init__(self, exchange: Exchange, context: int | None, setup: Setup) -> None:
        self._asked = anthropic_request.translate(exchange.body, counting=True, options=setup.options)
        exchange.headers_back = self._asked.dropped_header

    def body(self, model: str) -> bytes:
        return self._asked.body(model)

    def answer(self, exchange: Exchange) -> Mend | None:
        return None  # {"input_tokens": n} is what both say


class Responses(Translated):
    """POST /v1/responses."""

    def __init__(self, exchange: Exchange, context: int | None, setup: Setup) -> None:
        asked = responses_request.read(exchange.body)
        self._store = setup.responses
        self._owner = owner_of(exchange.header("authorization") or exchange.header("x-api-key"))
        self._previous = asked.previous_response_id
        history: list[responses_wire.Item] = []
        if self._previous is not None:
            history = self._resolved(conversation(chain(self._store, self._owner, self._previous)))
        if isinstance(asked.input, list):
            asked.input = self._resolved(asked.input)
        made = responses_request.translate(
            asked, exchange.body, history=history, context=context, options=setup.options
        )
        self._asked = made
        self._document = Document(
            key=f"hx{token_hex(16)}",
            model=exchange.model,
            created_at=int(time.time()),
            echo=made.echo,
            clock=time.time,
            show_summary=made.show_summary,
            seal=made.seal,
        )
        self._sink: ResponseBuilder | None = None  # of the latest attempt
        exchange.headers_back = made.dropped_header
        if exchange.stream:
            exchange.last_words = self._last_words

    @property
    def naming(self) -> Naming:
        return self._asked.places.name

    def body(self, model: str) -> bytes:
        return self._asked.body(model)

    def _resolved(self, items: list[responses_wire.Item]) -> list[responses_wire.Item]:
        return [self._found(item) if responses_input.is_reference(item) else item for item in items]

    def _found(self, reference: responses_wire.Item) -> responses_wire.Item:
        found = find_item(self._store, self._owner, reference.id or "")
        if found is None:
            raise not_found("Item", reference.id or "")
        return found

    def answer(self, exchange: Exchange) -> Mend | None:
        self._sink = ResponseEvents(self._document) if exchange.stream else ResponseBuilder(self._document)
        return ResponseAnswer(self._sink, called=self._asked.called, witness=Witness(exchange), naming=self.naming)

    def _last_words(self, error: HelexaError) -> bytes:
        sink = self._sink
        if not isinstance(sink, ResponseEvents):  # no node was asked
            self._sink = sink = ResponseEvents(self._document)
        return sink.fail(error)

    def over(self, exchange: Exchange) -> None:
        sink = self._sink
        if not self._asked.store or sink is None or not (exchange.t_first_token or sink.response):
            return  # nothing was said that anyone could come back to
        self._store.put(
            Record(
                id=self._document.id,
                owner=self._owner,
                previous=self._previous,
                input=responses_items.listed(exchange.body, self._document.key),
                response=sink.response or sink.broken_off(),
            )
        )


# By the path of the endpoint. Called with the exchange, the tokens that a request to its model may have, where known,
# and what was configured; raises HelexaError.
TRANSLATIONS: Final[dict[str, Callable[[Exchange, int | None, Setup], Translated]]] = {
    "/v1/messages": Messages,
    "/v1/messages/count_tokens": Count,
    "/v1/responses": Responses,
    "/api/chat": ollama.Chat,
    "/api/generate": ollama.Generate,
    "/api/embed": ollama.Embed,
    "/api/embeddings": ollama.EmbedOne,
}
