"""A request's events in the neuron's chat dialect: the chunks of a stream, which collected are the whole answer. Pure.

One Answer for a request, one Choice in it for each text that it asked for (`n`, several prompts). Chunks are plain
dicts, their keys in the order and spelling that the relay looks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

from helexa.neuron.harness.answers.pieces import CallArguments, CallStarted, Content, Parser, Piece, Reasoning
from helexa.neuron.harness.torch.logprobs import CompletionLogprobs, chat_logprobs
from helexa.neuron.harness.torch.request import Event, Failed, Finished, Progress, Text, Timings, TokenLogprob

Chunk = dict[str, Any]


class Choice(Protocol):
    """One text of the answer, as what stands in a chunk's `choices`."""

    reasoning_tokens: int

    def begin(self) -> list[Chunk]: ...

    def text(self, event: Text) -> list[Chunk]: ...

    def end(self, event: Finished) -> list[Chunk]:
        """The last of them bears the finish_reason."""


class ChatChoice:
    """logprobs: how many alternatives to tell beside each token; None: nothing."""

    def __init__(self, index: int, parser: Parser, *, logprobs: int | None = None) -> None:
        self.reasoning_tokens = 0
        self._index = index
        self._parser = parser
        self._top = logprobs
        self._tokens = 0
        self._told: list[TokenLogprob] = []  # of text that the parser holds back
        self._called = False

    def begin(self) -> list[Chunk]:
        return [self._choice({"role": "assistant", "content": ""})]  # "" and not null: some clients add to it

    def text(self, event: Text) -> list[Chunk]:
        self._tokens += event.tokens
        self._told += event.logprobs
        return self._choices(self._parser.feed(event.text))

    def end(self, event: Finished) -> list[Chunk]:
        choices = self._choices(self._parser.end())
        reason = "tool_calls" if self._called and event.reason == "stop" else event.reason
        last = self._choice({}, reason)
        last["stop_reason"] = event.stop_reason
        return [*choices, last]

    def _choices(self, pieces: Sequence[Piece]) -> list[Chunk]:
        return [self._choice(self._delta(piece)) for piece in pieces]

    def _choice(self, delta: Chunk, reason: str | None = None) -> Chunk:
        choice: Chunk = {"finish_reason": reason, "index": self._index, "delta": delta}
        if self._told:
            choice["logprobs"] = {"content": chat_logprobs(self._told, self._top or 0), "refusal": None}
            self._told = []
        return choice

    def _delta(self, piece: Piece) -> Chunk:
        match piece:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                self.reasoning_tokens = self._tokens
                return {"reasoning_content": text}
            case CallStarted(index, call_id, name):
                self._called = True
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


class CompletionChoice:
    """echo: the prompt, where it is to stand before the text."""

    def __init__(self, index: int, *, echo: str = "", logprobs: int | None = None) -> None:
        self.reasoning_tokens = 0
        self._index = index
        self._echo = echo
        self._logprobs = None if logprobs is None else CompletionLogprobs(logprobs)

    def begin(self) -> list[Chunk]:
        return [self._choice(self._echo)] if self._echo else []

    def text(self, event: Text) -> list[Chunk]:
        return [self._choice(event.text, event.logprobs)]

    def end(self, event: Finished) -> list[Chunk]:
        last = self._choice("")
        last["finish_reason"] = event.reason
        last["stop_reason"] = event.stop_reason
        return [last]

    def _choice(self, text: str, tokens: Sequence[TokenLogprob] = ()) -> Chunk:
        told = self._logprobs.tell(tokens) if self._logprobs is not None and tokens else None
        return {"text": text, "index": self._index, "logprobs": told, "finish_reason": None}


_OBJECTS: Final = {ChatChoice: "chat.completion.chunk", CompletionChoice: "text_completion"}


class Answer:
    """The answer to one request, as it comes.

    choices:   in the order of their index; `per_prompt` of them for each prompt
    usage:     tell it in an event of its own, behind all else; where not, the timings stand with the last finish_reason
    progress:  tell of the (first) prompt's prefill
    timings:   tell, with each token, how many there were and how long they took
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        *,
        model: str,
        answer_id: str,
        created: int,
        per_prompt: int = 1,
        usage: bool = True,
        progress: bool = False,
        timings: bool = False,
    ) -> None:
        self._choices = choices
        self._per_prompt = per_prompt
        self._usage = usage
        self._progress = progress
        self._timings = timings
        self._rest = {"created": created, "id": answer_id, "model": model, "object": _OBJECTS[type(choices[0])]}
        self._begun = [False] * len(choices)
        self._counts = [0] * len(choices)
        self._ends: dict[int, Finished] = {}

    @property
    def is_over(self) -> bool:
        return len(self._ends) == len(self._choices)

    def take(self, index: int, event: Event) -> list[Chunk]:
        """HOT, once for each token. The chunks to send now. Raises the HelexaError of an answer that failed."""
        choice = self._choices[index]
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Progress):
            return [self._of_progress(event)] if self._progress and index == 0 else []
        told = []
        if not self._begun[index]:
            self._begun[index] = True
            told = choice.begin()
        if isinstance(event, Text):
            self._counts[index] += event.tokens
            chunks = [self._chunk(one) for one in (*told, *choice.text(event))]
            if self._timings and chunks:
                chunks[-1]["timings"] = {"predicted_n": self._counts[index]}
            return chunks
        assert isinstance(event, Finished)
        self._ends[index] = event
        chunks = [self._chunk(one) for one in (*told, *choice.end(event))]
        if self.is_over:
            if self._usage:
                chunks.append({"choices": [], **self._rest, "usage": self._whole_usage()})
            chunks[-1]["timings"] = self._whole_timings()
        return chunks

    def _chunk(self, choice: Chunk) -> Chunk:
        return {"choices": [choice], **self._rest}

    def _of_progress(self, event: Progress) -> Chunk:
        progress = {
            "total": event.total,
            "cache": event.cached,
            "processed": event.processed,
            "time_ms": round(event.time_ms),
        }
        begun = self._choices[0].begin() if isinstance(self._choices[0], ChatChoice) else []
        return {"choices": begun, **self._rest, "prompt_progress": progress}

    def _of_each_prompt(self) -> list[list[Finished]]:
        ends = [self._ends[index] for index in range(len(self._choices))]
        return [ends[at : at + self._per_prompt] for at in range(0, len(ends), self._per_prompt)]

    def _whole_usage(self) -> Chunk:
        """Each choice's tokens, each prompt once."""
        prompts = self._of_each_prompt()
        prompt = sum(ends[0].usage.prompt for ends in prompts)
        completion = sum(end.usage.completion for end in self._ends.values())
        usage: Chunk = {
            "completion_tokens": completion,
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            # the choice that found least in the cache had to compute the rest
            "prompt_tokens_details": {"cached_tokens": sum(min(e.usage.cached for e in ends) for ends in prompts)},
        }
        if isinstance(self._choices[0], ChatChoice):
            thoughts = sum(choice.reasoning_tokens for choice in self._choices)
            usage["completion_tokens_details"] = {"reasoning_tokens": thoughts}
        return usage

    def _whole_timings(self) -> Chunk:
        """Choices run side by side: their tokens add up, their times do not."""
        prompts = [[end.timings for end in ends] for ends in self._of_each_prompt()]
        every = [timings for ends in prompts for timings in ends]
        return timings_of(
            Timings(
                prompt_n=sum(max(t.prompt_n for t in ends) for ends in prompts),
                prompt_ms=max(t.prompt_ms for t in every),
                predicted_n=sum(t.predicted_n for t in every),
                predicted_ms=max(t.predicted_ms for t in every),
                cache_n=sum(min(t.cache_n for t in ends) for ends in prompts),
            )
        )


def timings_of(timings: Timings) -> Chunk:
    return {
        "cache_n": timings.cache_n,
        "prompt_n": timings.prompt_n,
        "prompt_ms": round(timings.prompt_ms, 3),
        "prompt_per_second": _rate(timings.prompt_n, timings.prompt_ms),
        "predicted_n": timings.predicted_n,
        "predicted_ms": round(timings.predicted_ms, 3),
        "predicted_per_second": _rate(timings.predicted_n, timings.predicted_ms),
    }


def _rate(count: int, ms: float) -> float:
    return round(1000 * count / ms, 3) if ms > 0 else 0.0
