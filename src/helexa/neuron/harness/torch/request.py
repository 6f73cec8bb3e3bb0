"""What is asked of the engine, and what it tells of it. Values only; imports no torch."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from helexa.core.errors import HelexaError

MAX_TOP_LOGPROBS: Final = 20


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen. Applied in this order: penalties, bias, the grammar's mask, temperature, top_k, top_p,
    min_p; each filter sees what the one before it left, at probabilities that sum to 1 (as transformers does).

    temperature:         0 takes the most likely token, and none of the filters matters
    top_k:               0 is off
    repetition_penalty:  over 0; on every token of prompt and answer (logits over 0 are divided, others multiplied)
    presence_penalty, frequency_penalty: on tokens of the answer only, subtracted once or once per occurrence
    logit_bias:          by token id
    seed:                with it, the random number at each position of an answer is fixed; None: drawn by the engine
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer is bound to. text: a JSON schema as JSON, a Lark grammar (llguidance's dialect), or a regular
    expression; empty for json_object. param: the request's field that it came from, for errors."""

    kind: Literal["json_schema", "json_object", "lark", "regex"]
    text: str = ""
    param: str = "response_format"


@dataclass(frozen=True, slots=True)
class Request:
    """One answer, or one embedding. A request for n answers is n of these: their common prompt is computed once.

    prompt:       token ids, at least one
    max_tokens:   of the answer; None: to the end of the context
    stops:        strings that end the answer, and are not part of it
    logprobs:     how many of the most likely tokens to tell with each token's own; None: tell none. They are the
                  model's own, before penalties, bias, grammar and temperature
    special_text: tokens that the tokenizer calls special appear in the text (what parses tool calls may need them)
    ignore_eos:   go on after an end-of-text token, to max_tokens
    progress:     tell of the prefill
    pooling:      an embedding is wanted, not an answer: the last token's hidden state, or the mean of all
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stops: tuple[str, ...] = ()
    grammar: Grammar | None = None
    logprobs: int | None = None
    special_text: bool = False
    ignore_eos: bool = False
    progress: bool = False
    pooling: Literal["last", "mean"] | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its natural log-probability. data: its bytes, which need not be whole characters.
    top: the most likely tokens in its place, the best first, each without a `top` of its own."""

    id: int
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. cached: those of the prompt that were not computed again. completion: the one that ended it counts."""

    prompt: int
    completion: int
    cached: int


@dataclass(frozen=True, slots=True)
class Timings:
    """prompt: from the first step that computed any of it to the first token; predicted: from there to the last."""

    prompt_n: int  # computed, not taken from the cache
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    cache_n: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Of a prefill, where it was asked for: once when it begins, then after each chunk. Tokens; processed counts the
    cached ones too."""

    total: int
    cached: int
    processed: int
    time_ms: float


@dataclass(frozen=True, slots=True)
class Text:
    """More of an answer: whole characters, never empty but where it is the last tokens' that have none.
    tokens: how many tokens this text bears. logprobs: of each of them, where asked for."""

    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Embedded:
    """The pooled hidden state, scaled to length 1. A Finished follows."""

    vector: array[float]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that went well, or was cancelled.

    reason:      stop (the model's own end, a stop string, or a grammar that allows nothing more) | length | cancelled
    stop_reason: the stop string that matched
    """

    reason: Literal["stop", "length", "cancelled"]
    stop_reason: str | None
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that did not go well."""

    error: HelexaError


Event = Progress | Text | Embedded | Finished | Failed
Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """context: tokens of prompt and answer that one request may have
    rows:       requests computed at once
    chunk:      most prompt tokens computed in one step
    kv_tokens:  tokens whose keys and values are kept, over all requests and the prefix cache; at least `context`
    vocabulary: token ids are under it; those that the tokenizer does not know (padding) are refused, and never chosen
    """

    context: int
    rows: int
    chunk: int
    kv_tokens: int
    vocabulary: int
