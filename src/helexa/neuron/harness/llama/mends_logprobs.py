"""Log-probabilities of /v1/completions in the form that its clients know. Pure.

The engine answers in the form of chat, a list of tokens; OpenAI's completions have four lists side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class CompletionLogprobs:
    """top: alternatives for each token. Offsets count characters from the start of the choice's text."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._offsets: dict[int, int] = {}

    def chunk(self, chunk: dict[str, Any]) -> Sequence[dict[str, Any]]:
        for choice in chunk.get("choices") or ():
            if isinstance(told := choice.get("logprobs"), dict) and "content" in told:
                choice["logprobs"] = self._legacy(choice.get("index", 0), told["content"])
        return [chunk]

    def end(self) -> Sequence[dict[str, Any]]:
        return []

    def _legacy(self, index: int, tokens: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        offset = self._offsets.get(index, 0)
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token["token"])
        self._offsets[index] = offset
        return {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in token.get("top_logprobs", [])[: self._top]} for token in tokens
            ],
            "text_offset": offsets,
        }
