"""From one row of logits to the next token. Pure, on plain arrays: a row is scanned a few times, never sorted whole.

The filters go as transformers has them: temperature, top_k, top_p, min_p, each at probabilities that sum to 1. The one
random number of a position comes from the request's seed and that position alone, so that neither other requests nor a
preemption move it; the token is where it falls on the line of probabilities.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from helexa.neuron.harness.torch.request import Sampling, TokenLogprob

Floats = NDArray[Any]

# Tokens less likely than the best by more than these factors (in e-folds) are looked at only where those within do
# not settle it. Most rows are settled by some tens of tokens.
_NEAR: Final = (8.0, 16.0)


class NoNumbers(ValueError):
    """The model's logits have no largest finite number: it computed NaN, or infinities."""


def random_at(seed: int, position: int) -> float:
    """Uniform in [0, 1), 53 bits."""
    bits = xxhash.xxh3_64_intdigest(struct.pack("<Qq", seed & 0xFFFF_FFFF_FFFF_FFFF, position))
    return (bits >> 11) * 2.0**-53


class Chooser:
    """Chooses the tokens of one answer. vocabulary: ids are under it; longer rows are padding from there on."""

    def __init__(self, sampling: Sampling, prompt: tuple[int, ...], vocabulary: int, seed: int) -> None:
        self.sampling = sampling
        self._vocabulary = vocabulary
        self._seed = seed
        self._seen: NDArray[np.bool_] | None = None
        self._counts: NDArray[Any] | None = None
        self._bias: tuple[NDArray[Any], NDArray[Any]] | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = np.zeros(vocabulary, bool)
            self._seen[list(prompt)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = np.zeros(vocabulary, np.int32)
        if sampling.logit_bias:
            self._bias = (np.array(list(sampling.logit_bias)), np.array(list(sampling.logit_bias.values()), np.float32))

    def choose(self, row: Floats, position: int, allowed: NDArray[np.bool_] | None = None) -> int:
        """HOT, once per token; bench: bench/torch. row: logits, left as they are. position: of the token in the
        answer. allowed: by id, what the grammar lets through; at least one. Raises NoNumbers."""
        row = self._adjusted(row[: self._vocabulary])
        if allowed is not None:
            row = np.where(allowed, row, np.float32(-np.inf))
        best = int(row.argmax())
        if not np.isfinite(row[best]):
            raise NoNumbers
        if self.sampling.temperature == 0.0:
            return best
        ids, probabilities = distribution(row, self.sampling)
        if len(ids) == 1:
            return int(ids[0])
        line = np.cumsum(probabilities, dtype=np.float64)
        at = int(np.searchsorted(line, random_at(self._seed, position) * line[-1], side="right"))
        return int(ids[min(at, len(ids) - 1)])

    def took(self, token: int) -> None:
        """The answer has this token now."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def _adjusted(self, row: Floats) -> Floats:
        if self._seen is None and self._counts is None and self._bias is None:
            return row
        row = row.copy()
        if self._seen is not None:
            ids = np.flatnonzero(self._seen)
            values, penalty = row[ids], np.float32(self.sampling.repetition_penalty)
            row[ids] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts is not None:
            ids = np.flatnonzero(self._counts)
            row[ids] -= self.sampling.presence_penalty + self.sampling.frequency_penalty * self._counts[ids]
        if self._bias is not None:
            row[self._bias[0]] += self._bias[1]
        return row


def distribution(row: Floats, sampling: Sampling) -> tuple[NDArray[Any], Floats]:
    """The ids that temperature and filters leave, and their probabilities, which sum to 1. temperature > 0.
    With a filter they come by falling probability, of equals the lower id first; without one, by id."""
    temperature = max(sampling.temperature, 1e-6)
    best = row.max()
    top_k = sampling.top_k if 0 < sampling.top_k < len(row) else 0
    top_p = sampling.top_p if sampling.top_p < 1.0 else 0.0
    if not top_k and sampling.top_p >= 1.0 and sampling.min_p <= 0.0:
        ids = np.flatnonzero(row > -np.inf)
        weights = _weights(row[ids], best, temperature)
        return ids, weights / weights.sum()
    if top_k:
        ids = largest(row, top_k, temperature)
        weights = _weights(row[ids], best, temperature)
        whole = weights.sum()
    elif sampling.top_p >= 1.0:
        ids = _ranked(row, best + temperature * np.log(sampling.min_p) - 1e-3)
        weights = _weights(row[ids], best, temperature)
        whole = weights.sum()
    else:
        whole = _weights(row, best, temperature).sum()
        for near in (*_NEAR, np.inf):
            ids = _ranked(row, best - near * temperature)
            weights = _weights(row[ids], best, temperature)
            if weights.sum() >= top_p * whole:
                break
    if sampling.top_p < 1.0:
        before = np.cumsum(weights) - weights  # what is likelier than each: the first always stays
        count = max(1, int(np.count_nonzero(before < top_p * whole)))
        ids, weights = ids[:count], weights[:count]
    if sampling.min_p > 0.0:
        count = max(1, int(np.count_nonzero(weights >= sampling.min_p * weights[0])))
        ids, weights = ids[:count], weights[:count]
    return ids, weights / weights.sum()


def largest(row: Floats, count: int, scale: float = 1.0) -> NDArray[Any]:
    """Ids of the `count` largest, the largest first, of equals the lower id first. scale: near is within some of it."""
    best = row.max()
    for near in _NEAR:
        ids = _ranked(row, best - near * scale)
        if len(ids) >= count:
            return ids[:count]
    if count < len(row):
        edge = np.partition(row, len(row) - count)[len(row) - count]
        return _ranked(row, edge)[:count]
    return _ranked(row, -np.inf)[:count]


def logprobs_of(row: Floats, token: int, top: int, data: list[bytes]) -> TokenLogprob:
    """Natural logarithms, of the model's own distribution. data: each token's bytes, by id."""
    row = row[: len(data)]
    best = row.max()
    whole = float(best) + float(np.log(np.exp(row - best, dtype=np.float32).sum(dtype=np.float64)))
    others = tuple(
        TokenLogprob(int(i), data[int(i)], float(row[i]) - whole) for i in (largest(row, top) if top else ())
    )
    return TokenLogprob(token, data[token], float(row[token]) - whole, others)


def _weights(values: Floats, best: Any, temperature: float) -> Floats:
    """Probabilities but for a factor; 1 at best."""
    weights: Floats = np.exp((values - best) / np.float32(temperature), dtype=np.float32)
    return weights.astype(np.float64)


def _ranked(row: Floats, edge: Any) -> NDArray[Any]:
    """Ids of what is at least `edge` and more than nothing, the largest first, of equals the lower id first."""
    here = (row >= edge) & (row > -np.inf) if np.isinf(edge) else row >= edge
    ids: NDArray[Any] = np.flatnonzero(here)
    ranked: NDArray[Any] = ids[np.argsort(-row[ids], kind="stable")]
    return ranked
