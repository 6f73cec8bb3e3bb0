"""Dialects that nodes do not speak: the chat body that a node is asked with, and the machine that turns its answer.

The translating itself is pure and lives in core.dialects; here it meets an exchange. A request is translated once,
whatever number of nodes is tried; each attempt has an answer of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any, Final, Protocol

from helexa.core.dialects import anthropic_request, neuron_chat
from helexa.core.dialects.anthropic_request import Options
from helexa.core.dialects.anthropic_sinks import EventWriter, MessageBuilder
from helexa.core.dialects.anthropic_stream import Answer, Sink
from helexa.core.relay.contract import Exchange, Mend, Usage


class Translated(Protocol):
    """One request."""

    def body(self, model: str) -> bytes:
        """For a node that calls the model so."""

    def answer(self, exchange: Exchange) -> Mend | None:
        """For one attempt. None: the node's answer is the client's as it is."""


class Messages:
    """POST /v1/messages."""

    def __init__(self, exchange: Exchange, context: int | None, options: Options) -> None:
        self._asked = anthropic_request.translate(exchange.body, context=context, options=options)
        self.body = self._asked.body
        exchange.headers_back = self._asked.dropped_header

    def answer(self, exchange: Exchange) -> Mend | None:
        message_id = f"msg_{exchange.request_id}"
        form: type[EventWriter | MessageBuilder] = EventWriter if exchange.stream else MessageBuilder
        sink: Sink = form(message_id=message_id, model=exchange.model)
        return Answer(
            sink,
            message_id=message_id,
            max_tokens=self._asked.max_tokens,
            show_thinking=self._asked.show_thinking,
            witness=_Witness(exchange),
        )


class Count:
    """POST /v1/messages/count_tokens: the prompt is rendered as that of the request itself would be."""

    def __init__(self, exchange: Exchange, context: int | None, options: Options) -> None:
        asked = anthropic_request.translate(exchange.body, counting=True, options=options)
        self.body = asked.body
        exchange.headers_back = asked.dropped_header

    def answer(self, exchange: Exchange) -> Mend | None:
        return None  # {"input_tokens": n} is what both say


class _Witness:
    """Writes into the Exchange what the relay finds in other streams by itself."""

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def first_token(self) -> None:
        if not self._exchange.t_first_token:
            self._exchange.t_first_token = monotonic()

    def ended(self, usage: neuron_chat.Usage | None, finish_reason: str | None, timings: dict[str, Any] | None) -> None:
        exchange = self._exchange
        exchange.finish_reason = finish_reason
        exchange.timings = timings
        if usage is not None:
            exchange.usage = Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


# By the path of the endpoint. Called with the exchange, the tokens that a request to its model may have, where known,
# and what was configured; raises BadRequest.
TRANSLATIONS: Final[dict[str, Callable[[Exchange, int | None, Options], Translated]]] = {
    "/v1/messages": Messages,
    "/v1/messages/count_tokens": Count,
}
