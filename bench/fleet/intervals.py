"""Means over seeds, with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from statistics import mean, stdev
from typing import TypeVar

# 97.5 % points of Student's t, by degrees of freedom from 1.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)

R = TypeVar("R")


def ratio(ours: Sequence[R], theirs: Sequence[R], figure: Callable[[R], float]) -> str:
    """Of runs that are pairs."""
    return told([figure(a) / figure(b) for a, b in zip(ours, theirs, strict=True)])


def spread(runs: Sequence[R], figure: Callable[[R], float]) -> str:
    return told([figure(run) for run in runs])


def told(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    half = _T[min(len(values) - 2, len(_T) - 1)] * stdev(values) / sqrt(len(values))
    return f"{mean(values):.3f} +- {half:.3f}"
