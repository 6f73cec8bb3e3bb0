"""Products with a weight matrix, behind one interface: how a matrix is held is nobody else's matter.

On CPU a matrix is packed once into the order that oneDNN reads it in. Measured on one AVX-512 core with SmolLM2's
shapes, float32: F.linear takes 1.5 to 3.4 times as long for 4 to 8 tokens and 1.1 times for 512; for a single token it
is the quicker one for wide inputs (0.23 against 0.30 ms for 576 x 1536), which LEAST_ROWS mends.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any, Final, Protocol

import torch
from torch.nn import functional as F

# In float32 oneDNN took longer for one token than for four with the larger of these matrices (head: 7.6 and 6.1 ms).
LEAST_ROWS: Final = 4
_PACKED_FOR: Final = 512  # tokens; the order for many suits few as well, the one for a single token only that

_INT8_BLOCK: Final = 32  # weights of a row
_INT8_ROWS: Final = 8  # tokens; for more it is faster to make wide weights of them again


class Linear(Protocol):
    """A matrix [out, in], with its bias where it has one."""

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """x: [n, in]; plus: [n, out], float32, is added to the product. A new [n, out], in x's dtype without `plus`,
        float32 with it."""


class Dense:
    """As torch holds it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self._bias = weight, bias
        self._turned = weight.t()

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        if plus is None or self._bias is not None or plus.dtype != x.dtype:
            y = F.linear(x, self.weight, self._bias)
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


class Int8:
    """Eight bits a weight and a scale a row; activations stay in bfloat16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """weight: [out, in], float32, on the CPU."""
        scales = (weight.abs().amax(dim=1) / 127).clamp_(min=1e-12).to(torch.bfloat16)
        rounded = (weight / scales.float().unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
        # The kernel reads whole blocks of a row and looks at no end: another width is wrong answers, or a crash.
        self._short = -weight.shape[1] % _INT8_BLOCK
        self._weight = F.pad(rounded, (0, self._short)) if self._short else rounded
        self._scales, self._bias = scales, bias

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        x = F.pad(x, (0, self._short)) if self._short else x.contiguous()
        if x.shape[0] <= _INT8_ROWS:
            y = torch._weight_int8pack_mm(x, self._weight, self._scales)
        else:
            wide = wide_dtype()
            y = F.linear(x.to(wide), self._weight.to(wide)).mul_(self._scales).to(x.dtype)
        if self._bias is not None:
            y.add_(self._bias)
        return y if plus is None else plus + y


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, *, int8: bool = False) -> Linear:
    """The best that there is for this device and dtype. weight: [out, in], either of which may be 0; float32 for
    int8."""
    if int8:
        return Int8(weight, bias) if weight.numel() else Dense(weight.to(torch.bfloat16), bias)
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


@cache
def wide_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies in it as fast as in float32, or faster. Measured once."""

    def least_s(dtype: torch.dtype) -> float:
        x, weight = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(8):
            begin = time.perf_counter()
            F.linear(x, weight)
            times.append(time.perf_counter() - begin)
        return min(times)

    return torch.bfloat16 if least_s(torch.bfloat16) < 1.2 * least_s(torch.float32) else torch.float32


class _Ops:
    reorder: Any
    multiply: Any


@cache
def _ops() -> _Ops:
    ops = _Ops()
    ops.reorder = torch.ops.mkldnn._reorder_linear_weight.default
    ops.multiply = torch.ops.mkldnn._linear_pointwise.default
    return ops
