"""Log-probabilities as the two endpoints tell them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from helexa.neuron.harness.torch.request import TokenLogprob


def chat_logprobs(tokens: Iterable[TokenLogprob], top: int) -> list[dict[str, Any]]:
    """The entries of `logprobs.content`, each with `top` alternatives."""
    return [_entry(token) | {"top_logprobs": [_entry(other) for other in token.top[:top]]} for token in tokens]


def _entry(token: TokenLogprob) -> dict[str, Any]:
    # JSON has no infinity: a token that cannot come is very unlikely
    return {"id": token.id, "token": _text(token), "bytes": list(token.data), "logprob": max(token.logprob, -9999.0)}


def _text(token: TokenLogprob) -> str:
    """Part of a character is told as what a reader shows for it; `bytes` has it whole."""
    return token.data.decode("utf-8", "replace")


class CompletionLogprobs:
    """Of one choice of a completion: four lists side by side. Offsets count characters from its text's start."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._offset = 0

    def tell(self, tokens: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        texts = [_text(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob, -9999.0) for token in tokens],
            "top_logprobs": [
                {_text(other): max(other.logprob, -9999.0) for other in token.top[: self._top]} for token in tokens
            ],
            "text_offset": offsets,
        }
