"""Dialects that nodes do not speak: the chat body that a node is asked with, and the machine that turns its answer.

The translating itself is pure and lives in core.dialects; here it meets an exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from helexa.core.dialects import anthropic_errors, anthropic_request
from helexa.core.dialects.anthropic_sinks import EventWriter, MessageBuilder
from helexa.core.dialects.anthropic_stream import Answer, Sink
from helexa.core.dialects.node_errors import Naming
from helexa.core.relay.contract import Exchange, Mend
from helexa.cortex import ollama_translations as ollama
from helexa.cortex import responses_translations as responses
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


# By the path of the endpoint. Called with the exchange, the tokens that a request to its model may have, where known,
# and what was configured; raises HelexaError.
TRANSLATIONS: Final[dict[str, Callable[[Exchange, int | None, Setup], Translated]]] = {
    "/v1/messages": Messages,
    "/v1/messages/count_tokens": Count,
    "/v1/responses": responses.Responses,
    "/v1/responses/input_tokens": responses.Count,
    "/api/chat": ollama.Chat,
    "/api/generate": ollama.Generate,
    "/api/embed": ollama.Embed,
    "/api/embeddings": ollama.EmbedOne,
}
