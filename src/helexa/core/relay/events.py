"""One stream read event by event: what the client must not see is taken out, what the engine lost is put in.

Pure but for the exchange it fills and the clock it reads at the first token. The relay uses it until that token, where
a read does not end with a whole event, and from the usage event on.
"""

from __future__ import annotations

import re
from time import monotonic
from typing import Any, Final

import msgspec

from helexa.core import sse
from helexa.core.relay import scan
from helexa.core.relay.contract import Exchange

DONE: Final = b"data: [DONE]"
_BLANK_LINE: Final = re.compile(
    rb"\n\r?\n"
)  # it ends there; one that begins with a plain byte is found ten times as fast


class Events:
    """Decoded body bytes in (any cut), whole events out.

    cut_usage, cut_progress, first_event, stop_reason: as in contract.Route
    pending:      the beginning of an event that is not whole yet
    committed:    something other than a comment came; an attempt elsewhere is too late
    done_seen:    [DONE] came, so that nothing is lost if the connection is
    early_error:  the error of an error event that came before anything else; `feed` stopped in front of it, and
                  `go_on` lets it pass
    """

    __slots__ = (
        "_cut_progress",
        "_cut_usage",
        "_ending",
        "_exchange",
        "_first_event",
        "_stop_reason",
        "committed",
        "done_seen",
        "early_error",
        "pending",
    )

    def __init__(
        self,
        exchange: Exchange,
        *,
        cut_usage: bool,
        cut_progress: bool = False,
        first_event: bool = False,
        stop_reason: bool = False,
    ) -> None:
        self._exchange = exchange
        self._cut_usage = cut_usage
        self._cut_progress = cut_progress
        self._first_event = first_event
        self._stop_reason = stop_reason
        self._ending = b""  # the event with a finish reason, while the usage that follows it is to be cut
        self.pending = b""
        self.committed = self.done_seen = False
        self.early_error: Any = None

    @property
    def may_pass(self) -> bool:
        """The first token came, usage did not: until it does, nothing in the stream is to be looked at."""
        exchange = self._exchange
        return not self.pending and not self._ending and exchange.t_first_token > 0 and exchange.usage is None

    def feed(self, part: bytes, *, last: bool) -> bytes:
        """last: the body ends with this part."""
        whole = self.pending + part if self.pending else part
        out: list[bytes] = []
        begin = 0
        for blank in _BLANK_LINE.finditer(whole):
            self._take(whole[begin : blank.end()], out)
            if self.early_error is not None:
                break
            begin = blank.end()
        self.pending = whole[begin:]
        if last and self.pending and self.early_error is None:
            self._take(self.pending + b"\n\n", out)  # an engine that forgot its last blank line
            self.pending = b""
        if last:
            self._let_ending_go(out)
        return b"".join(out)

    def go_on(self, *, last: bool) -> bytes:
        """There is no other attempt to make: the error event passes, and what came behind it."""
        self.committed, self.early_error = True, None
        return self.feed(b"", last=last)

    def _take(self, block: bytes, out: list[bytes]) -> None:
        exchange = self._exchange
        if scan.is_only_comment(block):
            out.append(block)
            return
        found = scan.chunk_of(block)
        if found is not None:
            if found.error is not None and not self.committed:
                self.early_error = found.error
                return
            if found.prompt_progress is not None and self._cut_progress:
                return
            scan.note(exchange, found)
            if not exchange.t_first_token and found.has_delta:
                exchange.t_first_token = monotonic()
            if self._first_event and found.choices:
                self._first_event = False
                if not found.has_role:
                    out.append(_role_event(found))
            if self._cut_usage and found.is_usage_only:
                self._keep_timings(block)
                return
            if exchange.finish_reason is not None:
                self._let_ending_go(out)
                if self._stop_reason and scan.FINISH in block and b'"stop_reason":' not in block:
                    block = block.replace(scan.FINISH, b'"stop_reason":null,' + scan.FINISH)
                if self._cut_usage and scan.FINISH in block:
                    self.committed, self._ending = True, block
                    return
        elif block.startswith(DONE):
            self.done_seen = True
        self._let_ending_go(out)
        self.committed = True
        out.append(block)

    def _let_ending_go(self, out: list[bytes]) -> None:
        if self._ending:
            out.append(self._ending)
            self._ending = b""

    def _keep_timings(self, usage: bytes) -> None:
        """The engine's timings stand in its last event, which is the usage where that was asked for: without it, they
        would stand in the one before."""
        at = self._ending.rfind(b"}")
        if at > 0 and scan.TIMINGS not in self._ending and (raw := scan.object_after(usage, scan.TIMINGS)) is not None:
            self._ending = b"%b,%b%b%b" % (self._ending[:at], scan.TIMINGS, raw, self._ending[at:])


def _role_event(found: scan.Chunk) -> bytes:
    """The role delta that a chat stream begins with, for an engine that lost its own."""
    event = {
        "id": found.id,
        "object": "chat.completion.chunk",
        "created": found.created,
        "model": found.model,
        "choices": [
            # "" and not null: there are clients that add it to what follows
            {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            for choice in found.choices or ()
        ],
    }
    return sse.frame(msgspec.json.encode({k: v for k, v in event.items() if v is not None}))
