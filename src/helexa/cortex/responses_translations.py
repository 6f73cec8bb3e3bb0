"""OpenAI's Responses meet an exchange: what a request continues is looked up, what is answered is kept.

The translating itself is pure and lives in core.dialects.
"""

from __future__ import annotations

import time
from secrets import token_hex

import msgspec

from helexa.core.bodies import try_decode
from helexa.core.dialects import responses_input, responses_items, responses_request
from helexa.core.dialects import responses_wire as wire
from helexa.core.dialects.node_errors import Naming
from helexa.core.dialects.responses_document import Document
from helexa.core.dialects.responses_sinks import EventWriter, ResponseBuilder
from helexa.core.dialects.responses_stream import Answer
from helexa.core.errors import BadRequest, UpstreamError
from helexa.core.relay.contract import Exchange, Mend
from helexa.cortex.response_store import Items, Record, chain, conversation, not_found, owner_of
from helexa.cortex.translated import Setup, Translated, Witness


class _Asked(Translated):
    """A request, with what it continues and refers to."""

    def __init__(self, exchange: Exchange, context: int | None, setup: Setup) -> None:
        asked = responses_request.read(exchange.body)
        self._store = setup.responses
        self._owner = owner_of(exchange.header("authorization") or exchange.header("x-api-key"))
        self._previous = asked.previous_response_id
        self._items = Items(self._store, self._owner)
        self._referred: set[str] = set()
        history: list[wire.Item] = []
        if self._previous is not None:
            history = self._resolved(conversation(chain(self._store, self._owner, self._previous)))
        if isinstance(asked.input, list):
            asked.input = self._resolved(asked.input)
        self._asked = responses_request.translate(
            asked, exchange.body, history=history, context=context, options=setup.options
        )
        exchange.headers_back = self._asked.dropped_header

    @property
    def naming(self) -> Naming:
        return self._asked.places.name

    def body(self, model: str) -> bytes:
        return self._asked.body(model)

    def _resolved(self, items: list[wire.Item]) -> list[wire.Item]:
        return [self._found(item) if responses_input.is_reference(item) else item for item in items]

    def _found(self, reference: wire.Item) -> wire.Item:
        item_id = reference.id or ""
        if item_id in self._referred:  # a small body could name a large item without end
            raise BadRequest(f"Duplicate item found with id '{item_id}'; refer to it once", param="input")
        self._referred.add(item_id)
        found = self._items.find(item_id)
        if found is None:
            raise not_found("Item", item_id)
        return found


class Responses(_Asked):
    """POST /v1/responses."""

    def __init__(self, exchange: Exchange, context: int | None, setup: Setup) -> None:
        super().__init__(exchange, context, setup)
        made = self._asked
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
        if exchange.stream:
            exchange.last_words = lambda error: self._writer().fail(error)
            exchange.heartbeat = lambda text: self._writer().heartbeat(text)

    def answer(self, exchange: Exchange) -> Mend | None:
        self._sink = self._writer().anew() if exchange.stream else ResponseBuilder(self._document)
        return Answer(self._sink, called=self._asked.called, witness=Witness(exchange), naming=self.naming)

    def _writer(self) -> EventWriter:
        """Of a stream: the latest attempt's, or one for what is said before any node is asked."""
        sink = self._sink
        if not isinstance(sink, EventWriter):
            self._sink = sink = EventWriter(self._document)
        return sink

    def over(self, exchange: Exchange) -> None:
        sink = self._sink
        if not self._asked.store or sink is None or not (exchange.t_first_token or sink.response):
            return  # nothing was said that anyone could come back to
        listed = responses_items.try_listed(exchange.body, self._document.key)
        if listed is None:
            return
        self._store.put(
            Record(
                id=self._document.id,
                owner=self._owner,
                previous=self._previous,
                input=listed,
                response=sink.response or sink.broken_off(),
            )
        )


class Count(_Asked):
    """POST /v1/responses/input_tokens: the prompt is rendered as that of the request itself would be."""

    def answer(self, exchange: Exchange) -> Mend | None:
        return _Counted()


class _Told(msgspec.Struct):
    input_tokens: int


_told = msgspec.json.Decoder(_Told)


class _Counted:
    """A Mend: the node's {"input_tokens": n} as OpenAI says it."""

    def __init__(self) -> None:
        self._body = b""

    def feed(self, data: bytes) -> bytes:
        self._body += data
        return b""

    def finish(self) -> bytes:
        told = try_decode(_told, self._body)
        if told is None:
            raise UpstreamError("the node did not say how many tokens the input has")
        return b'{"object":"response.input_tokens","input_tokens":%d}' % told.input_tokens
