"""One line for each request, however it ended: kept until the second is over, then formatted and written at once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import msgspec

from helexa.core.errors import status_for
from helexa.core.relay.contract import Exchange

FLUSH_AT: Final = 256  # lines: about half a millisecond of formatting at once, however busy the second
CLIENT_GONE: Final = 499  # nginx's number, which dashboards know

_encoder = msgspec.json.Encoder()
_json, _json_of_all = _encoder.encode, _encoder.encode_lines


class Line(msgspec.Struct, omit_defaults=True, kw_only=True, tag_field="event", tag="request", gc=False):
    """What is known of a request, in the order it is read; what is unknown is left out. A Struct, since msgspec
    writes one four times as fast as a dictionary."""

    level: str
    timestamp: str
    request_id: str
    client: str
    endpoint: str
    model: str
    node: str = ""
    status: int
    stream: bool
    seconds: float
    first_token_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    tokens_per_s: float | None = None
    reads: int | None = None
    finish_reason: str | None = None
    client_gone: bool = False
    tried: str = ""
    error: str | None = None
    message: str | None = None


class RequestLog:
    """write gets whole lines, newline included. now: wall clock, seconds since the epoch."""

    def __init__(self, write: Callable[[str], object], *, as_json: bool, now: Callable[[], float]) -> None:
        self._write = write
        self._form = _json_lines if as_json else _text_lines
        self._now = now
        self._ended: list[Exchange] = []

    def add(self, exchange: Exchange) -> None:
        """HOT, once per exchange, at its end: nothing is formatted here."""
        exchange.body = b""  # megabytes for an image request; nobody reads it after the end
        self._ended.append(exchange)
        if len(self._ended) >= FLUSH_AT:
            self.flush()

    def flush(self, _loop_time: float = 0.0) -> None:
        """The server's on_tick; and once more at the end."""
        ended = self._ended
        if not ended:
            return
        self._ended = []
        stamp = datetime.fromtimestamp(self._now(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._write(self._form([line_of(exchange, stamp) for exchange in ended]))


def line_of(exchange: Exchange, stamp: str) -> Line:
    start, error, usage = exchange.t_start, exchange.error, exchange.usage
    line = Line(
        level="info",
        timestamp=stamp,
        request_id=exchange.request_id,
        client=exchange.client,
        endpoint=exchange.endpoint.path,
        model=exchange.model,
        node=exchange.node,
        status=outcome(exchange),
        stream=exchange.stream,
        seconds=_rounded(exchange.t_end - start),
    )
    if exchange.t_first_token:
        line.first_token_s = _rounded(exchange.t_first_token - start)
    if usage is not None:
        line.prompt_tokens = usage.prompt_tokens
        line.completion_tokens = usage.completion_tokens
        line.cached_tokens = usage.cached_tokens
        if (speed := tokens_per_second(exchange)) is not None:
            line.tokens_per_s = round(speed, 1)
    elif exchange.reads:
        line.reads = exchange.reads
    line.finish_reason = exchange.finish_reason
    line.client_gone = exchange.client_gone
    if exchange.tried:
        line.tried = ",".join(exchange.tried)
    if error is not None:
        line.error, line.message = error.code, error.message
    return line


def outcome(exchange: Exchange) -> int:
    """The status that tells how it ended: a 200 whose stream broke off is no success."""
    if exchange.error is not None and exchange.status < 400:
        return status_for(exchange.error, exchange.endpoint.dialect)
    return CLIENT_GONE if exchange.client_gone else exchange.status


def tokens_per_second(exchange: Exchange) -> float | None:
    """The engine's own count over its own decode time where it reports them; else what a stream let us see."""
    timings = exchange.timings
    if timings:
        count, took_ms = timings.get("predicted_n"), timings.get("predicted_ms")
        if count and took_ms:
            return float(count) / float(took_ms) * 1000.0
    usage = exchange.usage
    if usage is None or usage.completion_tokens < 2 or not exchange.t_first_token:
        return None
    took_s = exchange.t_end - exchange.t_first_token
    # The first token's time is the start of the interval, so it is not counted among those that fill it.
    return (usage.completion_tokens - 1) / took_s if took_s > 0 else None


def _rounded(seconds: float) -> float:
    """To four places. `round` goes by the decimal digits, exactly, and takes twice as long."""
    return int(seconds * 1e4 + 0.5) / 1e4


def _json_lines(lines: list[Line]) -> str:
    return _json_of_all(lines).decode()


def _text_lines(lines: list[Line]) -> str:
    return "".join(map(_text_line, lines))


def _text_line(line: Line) -> str:
    """As structlog's renderer for terminals has it."""
    fields = msgspec.to_builtins(line)
    stamp, event = fields.pop("timestamp"), fields.pop("event")
    pairs = " ".join([f"{key}={_value(value)}" for key, value in fields.items() if key != "level"])
    return f"{stamp} [{line.level:<9}] {event} {pairs}\n"


def _value(value: object) -> str:
    """A client names the model, so a value may hold anything: quoted unless it is plainly one word."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text if text and text.isprintable() and not (set(text) & {" ", '"', "="}) else _json(text).decode()
