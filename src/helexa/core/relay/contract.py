"""What the relay asks of the program it serves, and what it tells it. Types only.

The relay owns bytes, connections and deadlines. Which model, which node, whether to wait and what to count are the
program's: it gives the relay a Director.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from helexa.core.errors import Dialect, HelexaError

if TYPE_CHECKING:
    from helexa.core.relay.upstream import Upstream


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path of the inference plane."""

    path: str
    dialect: Dialect
    upstream_path: str  # what the node is asked
    generates: bool = True  # answers with tokens: may stream, has usage and a first token
    streams: bool = False  # a request that does not say whether it wants a stream wants one


class Peek(msgspec.Struct, gc=False):
    """The only fields that routing needs; all else in the body stays bytes."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class StreamOptions(msgspec.Struct, gc=False):
    include_usage: bool | None = None


class Usage(msgspec.Struct, frozen=True, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


# A Struct and not a dataclass, as Route below: one is made for every request, in C, in a quarter of the time.
class Exchange(msgspec.Struct, eq=False):
    """One request from its head to its last byte. The relay fills it; a Director reads it, and may keep `state`.

    Times are of the loop's clock (time.monotonic), seconds; 0.0 until they happen.
    """

    endpoint: Endpoint
    head: bytes  # the request's head as it came, for header()
    body: bytes
    model: str  # as the client named it
    stream: bool
    wants_usage: bool  # the client asked for a usage event itself
    gateway_usage: bool  # the gateway asked for it (x-helexa-usage), whatever the client did
    request_id: str
    client: str  # peer address without port; "unix" for a Unix socket
    t_start: float
    state: Any = None  # the Director's own
    tried: list[str] = []  # names of the upstreams that failed
    node: str = ""  # the upstream of the current or last attempt
    status: int = 0  # what the client got; 0 while open, 499 when it left before a head
    error: HelexaError | None = None
    client_gone: bool = False
    t_first_byte: float = 0.0  # first upstream body byte
    t_first_token: float = 0.0  # first generated delta
    t_end: float = 0.0
    usage: Usage | None = None
    finish_reason: str | None = None
    timings: dict[str, Any] | None = None  # the engine's own, where it reports them
    headers_back: bytes = b""  # header lines of the Director's for the client, each ending in CRLF
    # What a stream that fails ends with, in place of its dialect's own event.
    last_words: Callable[[HelexaError], bytes] | None = None
    # What a stream says while nothing is there to say, in place of its dialect's own heartbeat. Given what `progress`
    # tells, or b"".
    heartbeat: Callable[[bytes], bytes] | None = None
    reads: int = 0  # body reads relayed: a lower bound of deltas for a client that left before usage came

    def header(self, name: str) -> str | None:
        """A request header's value, name in lower case; None where it is absent. Scans: not for the hot path."""
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name.encode():
                return value.strip().decode("latin-1")
        return None


class Mend(Protocol):
    """Repairs the answer of a request that the harness marked. Never used for others: their bytes pass untouched.

    Either may raise HelexaError (the answer holds an error, or cannot be what was asked): the attempt failed.
    """

    def feed(self, data: bytes) -> bytes:
        """Decoded body bytes in (any cut), decoded body bytes out. b"" while it holds something back."""

    def finish(self) -> bytes:
        """The upstream's body ended; what is still to be sent."""


class Route(msgspec.Struct, eq=False):
    """Where one attempt goes and what changes on the way."""

    upstream: Upstream
    path: str | None = None  # what the upstream is asked, where it is not the endpoint's own `upstream_path`
    body: bytes | None = None  # None: as it came
    headers: bytes = b""  # further header lines for the upstream, each ending in CRLF
    mend: Mend | None = None
    first_event: bool = False  # see to it that a chat stream begins with a role delta
    content_type: bytes | None = (
        None  # told to the client in place of the upstream's: the mend makes another kind of body
    )
    cut_progress: bool = False  # take the prefill's progress events out of a stream whose client did not ask for them
    stop_reason: bool = False  # see to it that `stop_reason` stands beside each finish reason of a stream, if only null
    cut_usage: bool = False  # take the usage event out of a stream whose client did not ask for it
    # The mend makes whole events of another dialect: none of them is scanned, any of them commits, and what the relay
    # would have read out of them (usage, the first token, why it ended) the mend itself writes into the Exchange.
    translates: bool = False


class Reply(msgspec.Struct, eq=False):
    """The whole answer, where there is nothing to ask an upstream. No `released` follows it."""

    body: bytes
    content_type: bytes = b"application/json"


class Director(Protocol):
    """All calls come from the relay's loop. None may block."""

    def route(self, exchange: Exchange) -> Route | Reply | Awaitable[Route | Reply]:
        """Choose for the next attempt; HOT, so the common case answers at once and without a task.

        An awaitable means "wait" (a load, a queue): the relay sends heartbeats meanwhile and cancels it when the
        client leaves. After a failed attempt it is called again; `exchange.tried` names what failed. Raises
        HelexaError to refuse. What it takes (a seat, an in-flight count) is given back in `released`.
        """

    def progress(self, exchange: Exchange) -> bytes | None:
        """The text of the next heartbeat while a request waits ("loading qwen: 43 %"); None for a bare one."""

    def refused(self, exchange: Exchange, route: Route, status: int, body: bytes) -> HelexaError | None:
        """The upstream answered `status` >= 400 with this (bounded) body. None: forward it as it is. A Transient or
        UpstreamError lets the relay try another upstream; any other error is what the client gets."""

    def failed(self, exchange: Exchange, route: Route, error: HelexaError, *, mid_stream: bool) -> None:
        """An attempt failed at connection level or stalled. For health and counters."""

    def released(self, exchange: Exchange, route: Route) -> None:
        """The attempt is over, however it ended; exactly once for each Route that was given."""

    def done(self, exchange: Exchange) -> None:
        """The exchange is over; exactly once, refused requests included. For metrics and the one log line."""

    def is_stalled(self, exchange: Exchange, route: Route, silent_s: float) -> bool:
        """Nothing came for `stall_s` or longer: is the host stuck (True), or merely slow?"""
