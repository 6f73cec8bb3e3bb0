"""Products with a weight matrix, behind one interface: how a matrix is held is nobody else's matter."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F


class Linear(Protocol):
    """A matrix [out, in], with its bias where it has one."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [n, in]. A new [n, out] in x's dtype."""

    def add_to(self, into: torch.Tensor, x: torch.Tensor) -> None:
        """into: [n, out], float32; the product is added to it in place."""


class Dense:
    """As torch holds it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        self._turned = weight.t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def add_to(self, into: torch.Tensor, x: torch.Tensor) -> None:
        if into.dtype == x.dtype:
            torch.addmm(into, x, self._turned, out=into)
            if self._bias is not None:
                into.add_(self._bias)
        else:
            into.add_(F.linear(x, self._weight, self._bias))
