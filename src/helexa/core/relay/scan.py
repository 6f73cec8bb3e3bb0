"""What the relay reads out of an answer it otherwise only carries: the first generated delta, usage, why it ended.

Pure. Everything is found in decoded body bytes, in the neuron's chat dialect.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from helexa.core.bodies import try_decode
from helexa.core.errors import UpstreamError
from helexa.core.relay.contract import Exchange, Usage

# As a node writes them, without a space; unescaped they cannot stand inside a JSON string.
USAGE: Final = b'"usage":'
TIMINGS: Final = b'"timings":'
FINISH: Final = b'"finish_reason":"'
_SHORT = 4096
_ERROR: Final = b'"error":'
_FINISHED: Final = re.compile(rb'"finish_reason": *"')
_NULL: Final = re.compile(rb" *null")
_OBJECT = re.compile(rb"\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})")


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None

    def known(self) -> Usage:
        cached = self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None
        return Usage(self.prompt_tokens or 0, self.completion_tokens or 0, cached or 0)


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None  # /v1/completions
    finish_reason: str | None = None


class Chunk(msgspec.Struct, gc=False):
    """One data event of a stream, as far as the relay cares."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    timings: dict[str, Any] | None = None
    id: str | None = None
    created: int | None = None
    model: str | None = None
    error: Any = None
    prompt_progress: Any = None

    @property
    def has_delta(self) -> bool:
        """Something was generated: text, reasoning, or a tool call; not the role alone."""
        for choice in self.choices or ():
            delta = choice.delta
            if choice.text or (
                delta and (delta.content or delta.reasoning_content or delta.refusal or delta.tool_calls)
            ):
                return True
        return False

    @property
    def has_role(self) -> bool:
        return any(c.delta is not None and c.delta.role is not None for c in self.choices or ())

    @property
    def is_usage_only(self) -> bool:
        """The event that a client which did not ask for usage must not see."""
        return self.usage is not None and not self.choices


_chunks = msgspec.json.Decoder(Chunk)
_usages = msgspec.json.Decoder(_Usage)
_timings = msgspec.json.Decoder(dict[str, Any])


def chunk_of(block: bytes) -> Chunk | None:
    """A block of a stream (blank line included) as a Chunk; None for comments, `[DONE]` and what is not ours."""
    start = block.find(b"data:")
    if start < 0 or (start and block[start - 1] != 0x0A):
        return None
    return try_decode(_chunks, block[start + 5 :].strip())


def is_only_comment(block: bytes) -> bool:
    """Heartbeats: they commit nobody to an attempt."""
    return block.startswith(b":") and all(line.startswith(b":") or not line for line in block.split(b"\n"))


def settle_stream(exchange: Exchange, tail: bytes) -> None:
    """Fill usage, finish reason, timings and an error from the last events of a stream; `tail` may begin inside an
    event, and may have the lines of chunks between events. Of events that tell the same the last one counts."""
    usage = tail.rfind(USAGE)
    while usage >= 0 and _NULL.match(tail, usage + len(USAGE)):  # there are engines that say it in every event
        usage = tail.rfind(USAGE, 0, usage)
    finish = [match.start() for match in _FINISHED.finditer(tail)]
    done = 0
    for at in sorted({usage, tail.rfind(TIMINGS), tail.rfind(_ERROR), *finish[-1:]}):
        if at < done:  # not there, or in the event that was read last
            continue
        begin, done = tail.rfind(b"\n\n", 0, at), tail.find(b"\n\n", at)
        if done < 0:
            done = len(tail)
        if (found := chunk_of(tail[max(0, begin) : done])) is not None:
            note(exchange, found)


def note(exchange: Exchange, found: Chunk) -> None:
    """What one event says of the whole answer."""
    if found.usage is not None:
        exchange.usage = found.usage.known()
    if found.timings is not None:
        exchange.timings = found.timings
    if found.error is not None and exchange.error is None:
        exchange.error = UpstreamError(f"{exchange.node} ended the stream with an error: {str(found.error)[:500]}")
    for choice in found.choices or ():
        if choice.finish_reason is not None:
            exchange.finish_reason = choice.finish_reason


def settle_whole(exchange: Exchange, tail: bytes) -> None:
    """The same from the end of an answer in one piece; `tail` may lack its beginning (embeddings are megabytes)."""
    if len(tail) <= _SHORT and (found := try_decode(_chunks, tail)) is not None:
        note(exchange, found)  # for a short answer quicker than the search
        return
    if (raw := object_after(tail, USAGE)) is not None:
        usage = try_decode(_usages, raw)
        exchange.usage = usage.known() if usage is not None else None
    if TIMINGS in tail and (raw := object_after(tail, TIMINGS)) is not None:
        exchange.timings = try_decode(_timings, raw)
    if (at := tail.rfind(FINISH)) >= 0:
        end = tail.find(b'"', at + len(FINISH))
        exchange.finish_reason = tail[at + len(FINISH) : end].decode("utf-8", "replace") if end > 0 else None


def object_after(tail: bytes, key: bytes) -> bytes | None:
    """The object (of objects at most) behind the last `key`."""
    at = tail.rfind(key)
    found = _OBJECT.match(tail, at + len(key)) if at >= 0 else None
    return found.group(1) if found is not None else None
