"""One line for each request, however it ended. Kept until the second is over, then written at once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import msgspec

from helexa.core.relay.contract import Exchange
from helexa.cortex.metrics import outcome, tokens_per_second

_json = msgspec.json.Encoder().encode

Line = dict[str, str | int | float | bool | None]
FLUSH_AT: Final = 256  # lines: about a millisecond of formatting at once, however busy the second


class RequestLog:
    """write gets whole lines, newline included."""

    def __init__(self, write: Callable[[str], object], *, as_json: bool, now: Callable[[], float]) -> None:
        self._write = write
        self._as_json = as_json
        self._now = now  # wall clock, seconds since the epoch
        self._ended: list[Exchange] = []

    def add(self, exchange: Exchange) -> None:
        """HOT: keeps the exchange's figures without its body; nothing is formatted here."""
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
        form = self._json_line if self._as_json else text_line
        self._write("".join([form(stamp, fields(x)) for x in ended]))

    @staticmethod
    def _json_line(stamp: str, line: Line) -> str:
        return _json({"event": "request", "level": "info", "timestamp": stamp, **line}).decode() + "\n"


def fields(exchange: Exchange) -> Line:
    """What is known of a request, in the order it is read; a field that is unknown is left out."""
    end = exchange.t_end
    line: Line = {
        "request_id": exchange.request_id,
        "client": exchange.client,
        "endpoint": exchange.endpoint.path,
        "model": exchange.model,
        "node": exchange.node or None,
        "status": outcome(exchange),
        "stream": exchange.stream,
        "seconds": round(end - exchange.t_start, 4),
    }
    if exchange.t_first_token:
        line["first_token_s"] = round(exchange.t_first_token - exchange.t_start, 4)
    if (usage := exchange.usage) is not None:
        line["prompt_tokens"] = usage.prompt_tokens
        line["completion_tokens"] = usage.completion_tokens
        line["cached_tokens"] = usage.cached_tokens
        if (speed := tokens_per_second(exchange)) is not None:
            line["tokens_per_s"] = round(speed, 1)
    elif exchange.reads:
        line["reads"] = exchange.reads
    if exchange.finish_reason is not None:
        line["finish_reason"] = exchange.finish_reason
    if exchange.client_gone:
        line["client_gone"] = True
    if exchange.tried:
        line["tried"] = ",".join(exchange.tried)
    if exchange.error is not None:
        line["error"] = exchange.error.code
        line["message"] = exchange.error.message
    return {k: v for k, v in line.items() if v is not None}


def text_line(stamp: str, line: Line) -> str:
    pairs = " ".join([f"{k}={_value(v)}" for k, v in line.items()])
    return f"{stamp} [info     ] request {pairs}\n"


def _value(value: object) -> str:
    """A client names the model, so a value may hold anything: quoted unless it is plainly one word."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text if text and text.isprintable() and not (set(text) & {" ", '"', "="}) else _json(text).decode()
