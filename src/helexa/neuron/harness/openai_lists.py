"""Which fields of OpenAI's requests are known, and what becomes of each. Tables, by path.

Three lists, held to docs/reference/openai.md by a test: what is honoured; what is known and not supported (dropped and
named in `x-helexa-dropped`, or refused with a 400); whatever stands on none is the engine's to read or to ignore.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
EMBEDDINGS: Final = "/v1/embeddings"
RERANK: Final = "/v1/rerank"

_GENERATION: Final = (
    "model",
    "stream",
    "stream_options",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "logit_bias",
    "logprobs",
    "response_format",
    # labels: taken, and nothing hangs on them
    "user",
    "metadata",
    "safety_identifier",
    # a hint to the gateway, which looks for the node that has the prompt's beginning
    "prompt_cache_key",
    # what local clients send beside
    "top_k",
    "min_p",
    "repeat_penalty",
    "repeat_last_n",
    "grammar",
    "json_schema",
    "return_progress",
    "timings_per_token",
)
HONOURED: Final[dict[str, frozenset[str]]] = {
    CHAT: frozenset(
        {
            *_GENERATION,
            "messages",
            "top_logprobs",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "modalities",
            "reasoning_effort",
            "thinking_budget_tokens",
            "chat_template_kwargs",
        }
    ),
    COMPLETIONS: frozenset({*_GENERATION, "prompt", "suffix", "echo", "best_of"}),
    EMBEDDINGS: frozenset({"model", "input", "encoding_format", "dimensions", "user"}),
    RERANK: frozenset({"model", "query", "documents", "top_n", "return_documents"}),
}
# Dropped and named: the answer is a good one without them.
DROPPED: Final[dict[str, tuple[str, ...]]] = {
    CHAT: (
        "service_tier",
        "verbosity",
        "prediction",
        "moderation",
        "prompt_cache_options",
        "prompt_cache_retention",
    ),
    COMPLETIONS: ("service_tier",),
    EMBEDDINGS: (),
    RERANK: ("max_chunks_per_doc", "max_tokens_per_doc", "truncation", "truncate", "priority"),
}
# What such a field says when it asks for nothing out of the ordinary.
ORDINARY: Final[dict[str, tuple[Any, ...]]] = {"service_tier": ("auto", "default"), "verbosity": ("medium",)}
# Refused: the answer would be another one than was asked for.
REFUSED: Final[dict[str, tuple[str, ...]]] = {
    CHAT: ("audio", "web_search_options", "functions", "function_call", "store"),
    COMPLETIONS: (),
    EMBEDDINGS: (),
    RERANK: ("rank_fields", "return_embeddings"),
}


def dropped(asked: msgspec.Struct, path: str) -> tuple[str, ...]:
    """HOT. What of this request is known and not done, by name."""
    found = None
    for name in DROPPED[path]:
        value = getattr(asked, name)
        if value is not None and value not in ORDINARY.get(name, ()):
            found = [*(found or ()), name]
    return tuple(found) if found else ()
