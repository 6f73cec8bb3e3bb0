"""What llama.cpp's server does not answer rightly, repaired on the way. Pure: bytes in, bytes out.

The engine is always asked for a stream: only there each choice has its own usage and end, and only while it writes it
notices a client that left. Where the client wanted one piece, the mended events are collected into it. So there is one
code path: events are decoded, go through the steps in order, and are written or collected. Any cut of the bytes gives
the same.

    Stops       which stop string matched: `stop_reason` beside each finish_reason
    Usages      one usage for all choices (the engine gives each choice its own)
    Reasoning   completion_tokens_details.reasoning_tokens
    TopLogprobs as many alternatives as were asked for
    Echo        the prompt before a completion
    Completion logprobs and a forced or a described tool call have modules of their own (mends_logprobs, mends_tools).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgspec

from helexa.core import sse
from helexa.core.errors import HelexaError, UpstreamError
from helexa.neuron.harness.collect import Collector

Chunk = dict[str, Any]

_DONE: Final = b"[DONE]"
_PIECE: Final = 32 << 10  # the reader moves what is left behind each event: a whole answer at once would be quadratic
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class Step(Protocol):
    """One repair. Chunks may be changed in place; what is held back comes out later, or at the end."""

    def chunk(self, chunk: Chunk) -> Sequence[Chunk]: ...

    def end(self) -> Sequence[Chunk]:
        """The engine said [DONE]; what is still to be sent before it."""


class AnswerMend:
    """The Mend of a generated answer.

    into:    collects the answer where the client wanted it in one piece
    refuse:  what an error event means then (its data, in our taxonomy); in a stream such an event passes
    """

    def __init__(
        self, steps: Sequence[Step], into: Collector | None = None, refuse: Callable[[bytes], HelexaError] | None = None
    ) -> None:
        self._steps = steps
        self._into = into
        self._refuse = refuse
        self._reader = sse.EventReader()
        self._done = False

    def feed(self, data: bytes) -> bytes:
        pieces = (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
        return b"".join([self._block(block) for piece in pieces for block in self._reader.blocks(piece)])

    def finish(self) -> bytes:
        """Raises UpstreamError where the answer in one piece is not whole: the stream broke off."""
        rest = self._block(self._reader.pending) if self._reader.pending.strip() else b""
        if self._into is None:
            return rest
        if not self._done:
            raise UpstreamError("the engine ended before its answer was whole")
        return _encode(self._into.answer())

    def _block(self, block: bytes) -> bytes:
        if block.startswith(b"data: ") and block.endswith(b"}\n\n"):  # nearly every one, and whole: JSON has no newline
            data = block[6:-2]
        else:
            event = sse.parse(block)
            if event.comment:
                return b"" if self._into is not None else block
            data = event.data
        if data == _DONE:
            self._done = True
            return self._write(self._ended(), _DONE)
        try:
            chunk = _decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return block  # not ours to judge
        if not isinstance(chunk, dict):
            return b""  # the engine opens a stream of several prompts with `data: null`
        if "error" in chunk:
            if self._refuse is not None:
                raise self._refuse(data)
            return block
        return self._write(self._through(0, [chunk]))

    def _through(self, first: int, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        for step in self._steps[first:]:
            chunks = [out for chunk in chunks for out in step.chunk(chunk)]
        return chunks

    def _ended(self) -> list[Chunk]:
        return [chunk for i, step in enumerate(self._steps) for chunk in self._through(i + 1, step.end())]

    def _write(self, chunks: Sequence[Chunk], last: bytes | None = None) -> bytes:
        if self._into is not None:
            for chunk in chunks:
                self._into.add(chunk)
            return b""
        framed = [sse.frame(_encode(chunk)) for chunk in chunks]
        if last is not None:
            framed.append(sse.frame(last))
        return b"".join(framed)


class Stops:
    """`stop_reason`: the request's own stop string that ended a choice, or null.

    With `verbose` in the request the engine tells it in `__verbose`, beside what nobody asked for (the prompt again).
    It stands in the chunk with the finish_reason; should it come later, that chunk waits for it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = frozenset(stops)
        self._words: dict[int, str | None] = {}
        self._held: dict[int, Chunk] = {}

    def chunk(self, chunk: Chunk) -> Sequence[Chunk]:
        told = chunk.pop("__verbose", None)
        out: list[Chunk] = []
        if isinstance(told, dict) and "stop_type" in told:
            word = told.get("stopping_word") if told["stop_type"] == "word" else None
            index = told.get("index", 0)
            # A template has stop strings of its own; only the client's are a reason to tell it.
            self._words[index] = word if word in self._stops else None
            if index in self._held:
                out.append(self._reasoned(self._held.pop(index), index))
        index = _ended_choice(chunk)
        if index is None:
            out.append(chunk)
        elif index in self._words:
            out.append(self._reasoned(chunk, index))
        else:
            self._held[index] = chunk
        return out

    def end(self) -> Sequence[Chunk]:
        held, self._held = self._held, {}
        return [self._reasoned(chunk, index) for index, chunk in held.items()]

    def _reasoned(self, chunk: Chunk, index: int) -> Chunk:
        for choice in chunk["choices"]:
            choice["stop_reason"] = self._words.get(index)
        return chunk


class Usages:
    """One usage for the whole answer, as the last event: each choice's completion, each prompt once.

    The engine gives every choice its own usage and timings, in an event without choices (chat, where no index tells
    whose it is: there is one prompt) or in the choice's last event (completions). per_prompt: choices for each prompt
    (`n`). wanted: False where neither client nor gateway asked for a usage event.
    """

    def __init__(self, *, per_prompt: int, wanted: bool) -> None:
        self._per_prompt = per_prompt
        self._wanted = wanted
        self._completion = 0
        self._prompts: dict[int, dict[str, int]] = {}
        self._timings: dict[int, list[dict[str, Any]]] = {}
        self._shape: Chunk | None = None

    def chunk(self, chunk: Chunk) -> Sequence[Chunk]:
        usage = chunk.pop("usage", None)
        choices = chunk.get("choices")
        if not isinstance(usage, dict):
            return [chunk]
        prompt = choices[0].get("index", 0) // self._per_prompt if choices else 0
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        known = self._prompts.setdefault(prompt, {"tokens": usage.get("prompt_tokens", 0), "cached": cached})
        known["cached"] = min(known["cached"], cached)  # the choice that found least had to compute the rest
        self._completion += usage.get("completion_tokens", 0)
        if isinstance(timings := chunk.pop("timings", None), dict):
            self._timings.setdefault(prompt, []).append(timings)
        self._shape = {k: v for k, v in chunk.items() if k != "choices"}
        return [chunk] if choices else []

    def end(self) -> Sequence[Chunk]:
        if self._shape is None or not self._wanted:
            return []
        prompt = sum(p["tokens"] for p in self._prompts.values())
        cached = sum(p["cached"] for p in self._prompts.values())
        usage = {
            "completion_tokens": self._completion,
            "prompt_tokens": prompt,
            "total_tokens": prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        chunk = {"choices": [], **self._shape, "usage": usage}
        if self._timings:
            chunk["timings"] = _timings_of_all(self._timings)
        return [chunk]


def _timings_of_all(by_prompt: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Choices run side by side: their tokens add up, their times do not."""
    every = [t for timings in by_prompt.values() for t in timings]
    predicted_n = sum(t.get("predicted_n", 0) for t in every)
    predicted_ms = max(t.get("predicted_ms", 0.0) for t in every)
    prompt_n = sum(max(t.get("prompt_n", 0) for t in timings) for timings in by_prompt.values())
    prompt_ms = max(t.get("prompt_ms", 0.0) for t in every)
    return {
        "cache_n": sum(min(t.get("cache_n", 0) for t in timings) for timings in by_prompt.values()),
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_second": 1000 * prompt_n / prompt_ms if prompt_ms else 0.0,
        "predicted_n": predicted_n,
        "predicted_ms": predicted_ms,
        "predicted_per_second": 1000 * predicted_n / predicted_ms if predicted_ms else 0.0,
    }


class Reasoning:
    """`completion_tokens_details.reasoning_tokens`: what each choice had generated at its last piece of reasoning.

    The request asks for timings with each token, whose predicted_n counts exactly (several tokens may share an event);
    they are taken out again unless the client wanted them.
    """

    def __init__(self, *, timings_asked: bool) -> None:
        self._keep = timings_asked
        self._tokens: dict[int, int] = {}

    def chunk(self, chunk: Chunk) -> Sequence[Chunk]:
        timings = chunk.get("timings")
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta")
            if delta and delta.get("reasoning_content") and timings:
                self._tokens[choice.get("index", 0)] = timings.get("predicted_n", 0)
            if choice.get("finish_reason") is None and not self._keep:
                chunk.pop("timings", None)
        if isinstance(usage := chunk.get("usage"), dict):
            usage["completion_tokens_details"] = {"reasoning_tokens": sum(self._tokens.values())}
        return [chunk]

    def end(self) -> Sequence[Chunk]:
        return []


class TopLogprobs:
    """Chat log-probabilities with exactly `top` alternatives: the engine cannot give none, and by default gives 20.
    Beside them the null for those of a refusal, which OpenAI's description requires and the engine leaves out."""

    def __init__(self, top: int) -> None:
        self._top = top

    def chunk(self, chunk: Chunk) -> Sequence[Chunk]:
        for choice in chunk.get("choices") or ():
            told = choice.get("logprobs")
            if not told:
                continue
            told.setdefault("refusal", None)
            for token in told.get("content") or ():
                token["top_logprobs"] = token.get("top_logprobs", [])[: self._top]
        return [chunk]

    def end(self) -> Sequence[Chunk]:
        return []


class Echo:
    """`echo` of a completion: each choice begins with its prompt. per_prompt: choices for each (`n`)."""

    def __init__(self, prompts: Sequence[str], *, per_prompt: int) -> None:
        self._prompts = prompts
        self._per_prompt = per_prompt
        self._begun: set[int] = set()

    def chunk(self, chunk: Chunk) -> Sequence[Chunk]:
        if "prompt_progress" in chunk:  # not every client is shown it
            return [chunk]
        for choice in chunk.get("choices") or ():
            index = choice.get("index", 0)
            if index not in self._begun:
                self._begun.add(index)
                choice["text"] = self._prompts[index // self._per_prompt] + (choice.get("text") or "")
        return [chunk]

    def end(self) -> Sequence[Chunk]:
        return []


class RerankMend:
    """Adds to each result the document that it ranks."""

    def __init__(self, documents: Sequence[str | dict[str, Any]]) -> None:
        self._documents = documents
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        self._parts.append(data)
        return b""

    def finish(self) -> bytes:
        answer = _decode(b"".join(self._parts))
        for result in answer["results"]:
            document = self._documents[result["index"]]
            result["document"] = {"text": document} if isinstance(document, str) else document
        return _encode(answer)


def _ended_choice(chunk: Chunk) -> int | None:
    """The index of the choice that this chunk ends."""
    for choice in chunk.get("choices") or ():
        if choice.get("finish_reason") is not None:
            return int(choice.get("index", 0))
    return None
