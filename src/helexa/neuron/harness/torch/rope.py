"""How positions turn queries and keys: tables of unit complex numbers, one row a position.

A head's dimensions are kept in pairs (i, i + d/2) side by side, so that turning is one complex product in place: the
rows of the query and key weights are brought into that order when they are read (`paired`), which no dot product
notices.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from helexa.neuron.harness.torch.config import Rope

_STEP: Final = 1024  # positions; tables grow by at least so many


def paired(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """rows: [heads * head_dim, ...], the halves of each head one after the other. A copy in pairs."""
    rest = rows.shape[1:]
    return rows.reshape(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(rows.shape)


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] float32: radians a position."""
    # In the precision of the reference implementation: an angle is a position times this, and errors grow with it.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    turns = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return turns / rope.factor
    if rope.kind == "llama3":
        return _llama3(turns, rope)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, exponents)
    return turns


def _llama3(turns: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Long waves are stretched, short ones kept, and those between blended."""
    waves = 2 * math.pi / turns
    longest = rope.original_context / rope.low_freq_factor
    shortest = rope.original_context / rope.high_freq_factor
    kept = (rope.original_context / waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - kept) * turns / rope.factor + kept * turns
    stretched = torch.where(waves > longest, turns / rope.factor, turns)
    between = (waves >= shortest) & (waves <= longest)
    return torch.where(between, blended, stretched)


def _yarn(rope: Rope, head_dim: int, exponents: torch.Tensor) -> torch.Tensor:
    """arXiv 2309.00071: dimensions that turn often keep their frequency, those that turn rarely are stretched."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    waves = rope.theta**exponents
    return (1.0 / (rope.factor * waves)) * ramp + (1.0 / waves) * (1 - ramp)


class Turns:
    """The table of one rope. Grows as positions are asked for."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self._rope = rope
        self._frequencies = inverse_frequencies(rope, head_dim)
        self._device = device
        self._table: Any = torch.empty(0, head_dim // 2, dtype=torch.complex64, device=device)

    def at(self, positions: torch.Tensor, highest: int) -> torch.Tensor:
        """positions: [n] int64, none over `highest`. [n, 1, head_dim / 2] complex64"""
        if highest >= self._table.shape[0]:
            count = max(highest + 1, self._table.shape[0] + _STEP)
            angles = torch.outer(torch.arange(count, dtype=torch.float32), self._frequencies)
            lengths = torch.full_like(angles, self._rope.magnitude)
            self._table = torch.polar(lengths, angles).to(self._device)
        return self._table.index_select(0, positions).unsqueeze_(1)
