"""MLPs, dense or routed to experts; called as a linear layer is. Sums over ranks are the decoder's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from helexa.neuron.harness.torch.config import Experts
from helexa.neuron.harness.torch.linear import Linear


class Mlp:
    """gate_up: [2 * width, hidden], the gate's rows first."""

    def __init__(self, gate_up: Linear, down: Linear, width: int, activation: str) -> None:
        self._gate_up, self._down, self._width = gate_up, down, width
        self._gelu = activation == "gelu_tanh"

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        both = self._gate_up(x)
        gate, up = both[:, : self._width], both[:, self._width :]
        gate = F.gelu(gate, approximate="tanh") if self._gelu else F.silu(gate)
        return gate.mul_(up)

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        return self._down(self.inner(x), plus)


class RoutedMlp:
    """experts: those of this rank, by the model's number. The router is whole on each rank."""

    def __init__(self, config: Experts, router: torch.Tensor, experts: Mapping[int, Mlp]) -> None:
        self._config, self._router, self._experts = config, router, experts

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """float32, whatever x is."""
        into = torch.zeros_like(x, dtype=torch.float32) if plus is None else plus.clone()
        scores = F.linear(x, self._router).float().softmax(dim=-1)
        weights, chosen = scores.topk(self._config.per_token, dim=-1)
        if self._config.renormalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        for number in chosen.unique().tolist():
            expert = self._experts.get(number)
            if expert is None:
                continue
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            got = expert(x.index_select(0, tokens)) * weights[tokens, place].unsqueeze(1)
            into.index_add_(0, tokens, got.float())
        return into
