"""The neuron's chat dialect as the translators read it: one data event of its stream. Wire types only.

Only what another dialect needs is named; everything else in a chunk is skipped undecoded.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

DONE: Final = b"[DONE]"


class Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    """A piece of a call: the first one of its index bears id and name, later ones pieces of the arguments."""

    index: int = 0
    id: str | None = None
    function: Function | None = None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None


class TopLogprob(msgspec.Struct):
    token: str = ""
    logprob: float = 0
    bytes: list[int] | None = None


class Logprob(TopLogprob):
    """Of one token, with those that it was chosen from."""

    top_logprobs: list[TopLogprob] = []


class Logprobs(msgspec.Struct):
    content: list[Logprob] | None = None


class Choice(msgspec.Struct):
    delta: Delta | None = None
    finish_reason: str | None = None
    stop_reason: str | None = None  # the stop string that matched
    index: int = 0
    logprobs: Logprobs | None = None
    text: str | None = None  # of a completion, in place of the delta


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details is not None else 0

    @property
    def reasoning_tokens(self) -> int:
        details = self.completion_tokens_details
        return (details.reasoning_tokens or 0) if details is not None else 0


class PromptProgress(msgspec.Struct):
    """Where the prefill stands; the first one comes before any work and knows the whole prompt."""

    total: int = 0
    cache: int = 0
    processed: int = 0


class Chunk(msgspec.Struct):
    choices: list[Choice] | None = None
    usage: Usage | None = None
    prompt_progress: PromptProgress | None = None
    timings: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


decode: Final = msgspec.json.Decoder(Chunk).decode  # raises one of core.bodies.NOT_JSON
