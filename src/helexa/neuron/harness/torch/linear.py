"""Products with a weight matrix, behind one interface: how a matrix is held is nobody else's matter.

On CPU a matrix is packed once into the order that oneDNN reads it in. Measured on one AVX-512 core with SmolLM2's
shapes: half the time of F.linear's for 4 to 16 tokens, in float32 and in bfloat16, and never slower.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final, Protocol

import torch
from torch.nn import functional as F

# In float32 oneDNN takes longer for one token than for four: it then reads a packed matrix as it lies.
LEAST_ROWS: Final = 4
_PACKED_FOR: Final = 512  # tokens; the order for many suits few as well, the one for a single token only that


class Linear(Protocol):
    """A matrix [out, in], with its bias where it has one."""

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """x: [n, in]; plus: [n, out], float32, is added to the product. A new [n, out], in x's dtype without `plus`,
        float32 with it."""


class Dense:
    """As torch holds it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        self._turned = weight.t()

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        if plus is None or self._bias is not None or plus.dtype != x.dtype:
            y = F.linear(x, self._weight, self._bias)
            return y if plus is None else plus + y
        return torch.addmm(plus, x, self._turned)


class Packed:
    """In oneDNN's own order."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = _ops().reorder(weight.contiguous(), _PACKED_FOR)
        self._bias = bias
        self._multiply = _ops().multiply

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        y = self._multiply(x, self._weight, self._bias, "none", [], "")
        if plus is None:
            return y
        return y.add_(plus) if y.dtype == plus.dtype else plus + y


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The best that there is for this device and dtype. weight: [out, in], either of which may be 0."""
    if weight.device.type == "cpu" and weight.numel() and packs(weight.dtype):
        return Packed(weight, bias)
    return Dense(weight, bias)


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this torch, on this CPU, multiplies with packed matrices of the dtype, and rightly."""
    try:
        x = torch.linspace(-1, 1, 5 * 48).view(5, 48).to(dtype)
        weight = torch.linspace(-1, 2, 32 * 48).view(32, 48).to(dtype)
        got, known = Packed(weight)(x), F.linear(x.float(), weight.float())
        return bool(torch.allclose(got.float(), known, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-4))
    except (AttributeError, RuntimeError, TypeError):  # the operators are torch's own, made for its compiler
        return False


class _Ops:
    reorder: Any
    multiply: Any


@cache
def _ops() -> _Ops:
    ops = _Ops()
    ops.reorder = torch.ops.mkldnn._reorder_linear_weight.default
    ops.multiply = torch.ops.mkldnn._linear_pointwise.default
    return ops
