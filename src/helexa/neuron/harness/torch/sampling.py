"""From one row of logits to the next token. Pure, on plain arrays: a row is scanned a few times, never sorted whole.

The filters go as transformers has them: temperature, top_k, top_p, min_p, each at probabilities that sum to 1. The one
random number of a position comes from the request's seed and that position alone, so that neither other requests nor a
preemption move it; the token is where it falls on the line of probabilities.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from helexa.neuron.harness.torch.request import Sampling, TokenLogprob

Floats = NDArray[Any]

# Tokens less likely than the best by more than this (in e-folds) are looked at only where those within do not settle
# it. Most rows are settled by some tens of tokens.
_NEAR: Final = 8.0
_FAR: Final = 12.0
_STRETCH: Final = 256  # tokens whose weights are summed at once


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
        ids, weights = _kept(row, self.sampling)
        at = landing(weights, random_at(self._seed, position))
        return at if ids is None else int(ids[at])

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
    """The ids that temperature and filters leave, in the order of their stretches on the line, and their probabilities,
    which sum to 1. temperature > 0."""
    ids, weights = _kept(row, sampling)
    if ids is None:
        ids = np.flatnonzero(weights)
        weights = weights[ids]
    weights = weights.astype(np.float64)
    return ids, weights / weights.sum()


def landing(weights: Floats, where: float) -> int:
    """On whose stretch of the line of all weights `where` of its length lies, from 0 to 1; never on one of no weight.
    A running sum over a whole vocabulary costs ten times as much as the sums of its parts."""
    if len(weights) <= 4 * _STRETCH:
        return _landing(weights, where, 0.0)[0]
    cut = len(weights) // _STRETCH * _STRETCH
    parts = np.append(weights[:cut].reshape(-1, _STRETCH).sum(axis=1), weights[cut:].sum())
    part, before = _landing(parts, where, 0.0)
    begin = part * _STRETCH
    return begin + _landing(weights[begin : begin + _STRETCH], 0.0, before)[0]


def _landing(weights: Floats, where: float, point: float) -> tuple[int, float]:
    """On which stretch `where` of the line's length and `point` more lies, and how far behind its beginning."""
    line = np.cumsum(weights, dtype=np.float64)
    point += where * float(line[-1])
    at = int(np.searchsorted(line, point, side="right"))
    if at == len(line):  # rounded up to the very end: the last that has any weight
        at = int(np.searchsorted(line, line[-1], side="left"))
    return at, point - float(line[at - 1]) if at else point


def largest(row: Floats, count: int, scale: float = 1.0) -> NDArray[Any]:
    """Ids of the `count` largest, the largest first, of equals the lower id first; fewer where the rest is -inf.
    scale: those near the best are looked at first, and this is the measure of near."""
    best = row.max()
    for near in (_NEAR, 2 * _NEAR, 4 * _NEAR, np.inf):  # a scan costs a twentieth of ranking the whole row
        ids: NDArray[Any] = np.flatnonzero(row > best - near * scale)
        if len(ids) >= count:
            break
    values = row[ids]
    if len(ids) > 2 * count:
        near = values >= np.partition(values, len(ids) - count)[len(ids) - count]
        ids, values = ids[near], values[near]
    ranked: NDArray[Any] = ids[np.argsort(-values, kind="stable")][:count]
    return ranked


def _kept(row: Floats, sampling: Sampling) -> tuple[NDArray[Any] | None, Floats]:
    """Ids (None: all, in order), and their probabilities but for a common factor. Nothing of the whole row's size is
    sorted where what is near the best settles it."""
    temperature = max(sampling.temperature, 1e-6)
    ids: NDArray[Any] | None = None
    values, best = row, row.max()
    if 0 < sampling.top_k < len(row):
        ids = largest(row, sampling.top_k, temperature)
        values = row[ids]
    weights: Floats = np.exp((values - best) / np.float32(temperature))
    if sampling.top_p < 1.0:
        kept = _nucleus(weights, sampling.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if sampling.min_p > 0.0:
        kept = np.flatnonzero(weights >= np.float32(sampling.min_p) * weights.max())
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def _nucleus(weights: Floats, top_p: float) -> NDArray[Any]:
    """Which are the fewest, likeliest first, that together have `top_p` of the weight; in their old order. At least
    one; of equals the earlier one."""
    enough = top_p * weights.sum(dtype=np.float64)
    for least in (math.exp(-_NEAR), math.exp(-_FAR), 0.0):
        near: NDArray[Any] = np.flatnonzero(weights > least * weights.max())
        values = weights[near]
        if values.sum(dtype=np.float64) >= enough:
            break
    falling = np.sort(values)[::-1]
    before = np.cumsum(falling, dtype=np.float64) - falling
    count = max(1, int(np.count_nonzero(before < enough)))
    edge = falling[count - 1]
    kept = np.flatnonzero(values >= edge)
    if len(kept) > count:  # some are equal to the last one
        equal = np.flatnonzero(values[kept] == edge)
        kept = np.delete(kept, equal[len(equal) - (len(kept) - count) :])
    found: NDArray[Any] = near[kept]
    return found


def logprobs_of(row: Floats, token: int, top: int, data: list[bytes]) -> TokenLogprob:
    """Natural logarithms, of the model's own distribution. data: each token's bytes, by id."""
    best = row.max()
    whole = float(best) + float(np.log(np.exp(row - best, dtype=np.float32).sum(dtype=np.float64)))
    others = tuple(
        TokenLogprob(int(i), data[int(i)], float(row[i]) - whole) for i in (largest(row, top) if top else ())
    )
    return TokenLogprob(token, data[token], float(row[token]) - whole, others)
