"""Event streams as llama.cpp's server writes them (xllamacpp 2026.10), shortened: what mends are fed in tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Event = dict[str, Any]

HEAD = {"created": 1795533239, "id": "chatcmpl-0123456789abcdefghijklmnopqrstuv", "model": "smol"}
DONE = b"data: [DONE]\n\n"


def frames(events: Sequence[Any], *, done: bool = True) -> bytes:
    text = b"".join(
        b"data: " + json.dumps(e, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n" for e in events
    )
    return text + DONE if done else text


def delta(index: int = 0, finish: str | None = None, **members: Any) -> Event:
    choice = {"finish_reason": finish, "index": index, "delta": members}
    return {"choices": [choice], **HEAD, "object": "chat.completion.chunk"}


def role(index: int = 0) -> Event:
    return delta(index, role="assistant", content=None)


def text(*pieces: str, index: int = 0) -> list[Event]:
    return [delta(index, content=piece) for piece in pieces]


def usage(completion: int, prompt: int = 7, cached: int = 0) -> Event:
    return {
        "choices": [],
        **HEAD,
        "object": "chat.completion.chunk",
        "usage": usage_of(completion, prompt, cached),
        "timings": timings(completion, prompt, cached),
    }


def usage_of(completion: int, prompt: int = 7, cached: int = 0) -> Event:
    return {
        "completion_tokens": completion,
        "prompt_tokens": prompt,
        "total_tokens": completion + prompt,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(completion: int, prompt: int = 7, cached: int = 0) -> Event:
    return {
        "cache_n": cached,
        "prompt_n": prompt - cached,
        "prompt_ms": 10.0,
        "predicted_n": completion,
        "predicted_ms": 20.0 * completion,
    }


def stopped(word: str | None, index: int = 0) -> Event:
    """What `verbose` adds to the event that ends a choice."""
    kind, found = ("word", word) if word is not None else ("eos", "")
    return {"__verbose": {"index": index, "stop_type": kind, "stopping_word": found, "prompt": "the prompt again"}}


def completion(index: int, piece: str, finish: str | None = None, logprobs: Any = None, **more: Any) -> Event:
    choice = {"text": piece, "index": index, "logprobs": logprobs, "finish_reason": finish}
    return {"choices": [choice], **HEAD, "object": "text_completion", **more}


def token(piece: str, logprob: float, *others: tuple[str, float]) -> Event:
    tops = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in ((piece, logprob), *others)]
    return {"id": 1, "token": piece, "bytes": list(piece.encode()), "logprob": logprob, "top_logprobs": tops}
