"""The decoder of one rank: everything between token ids and logits, described by a ModelConfig.

The residual stream is float32 whatever the weights are. It is the same on every rank: what a rank's heads and columns
add is summed over the ranks before it joins. Rank 0 alone adds the residual and the biases of what is summed, so that
the sum has them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from helexa.neuron.harness.torch.attention import RowPlan, attend
from helexa.neuron.harness.torch.config import Heads, Layer, ModelConfig
from helexa.neuron.harness.torch.experts import Mlp, RoutedMlp
from helexa.neuron.harness.torch.linear import Linear
from helexa.neuron.harness.torch.rope import Turns
from helexa.neuron.tp.partition import Span


class Summer(Protocol):
    """What the decoder needs of a Collective."""

    rank: int

    def all_reduce(self, tensor: torch.Tensor) -> None: ...

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None: ...


@dataclass(slots=True)
class Block:
    """One layer's weights. Norms are float32; the last two are there where the model has sandwich norms."""

    kind: Layer
    before: torch.Tensor
    qkv: Linear
    qk_norm: torch.Tensor | None  # [queries + kv, head_dim]
    out: Linear
    middle: torch.Tensor
    mlp: Mlp | RoutedMlp
    after_attention: torch.Tensor | None = None
    after_mlp: torch.Tensor | None = None


class Decoder:
    def __init__(
        self,
        config: ModelConfig,
        heads: Heads,
        vocabulary: Span,
        embedding: torch.Tensor,
        blocks: Sequence[Block],
        norm: torch.Tensor,
        head: Linear | None,
        dtype: torch.dtype,
        summer: Summer | None,
    ) -> None:
        """vocabulary: the rows of embedding and head that are this rank's. dtype: what is multiplied.
        summer: None where there is one rank."""
        self._config, self._heads = config, heads
        self._vocabulary = vocabulary
        self._embedding, self._blocks, self._norm, self._head = embedding, blocks, norm, head
        self._dtype = dtype
        self._summer = summer
        self._turns = [Turns(rope, config.head_dim, embedding.device) for rope in config.ropes]
        self._turned = (heads.queries + len(heads.kv)) * config.head_dim

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, highest: int, plans: Sequence[RowPlan]
    ) -> torch.Tensor:
        """HOT: a step is this. tokens, positions: [n] int64; those beyond the plans' rows are computed without
        attention, for nothing. The residual stream after the last layer, [n, hidden] float32."""
        config = self._config
        x = self._embed(tokens)
        cis = [turns.at(positions, highest) for turns in self._turns]
        for number, block in enumerate(self._blocks):
            h = self._normed(x, block.before)
            qkv = block.qkv(h)
            self._turn(qkv, block, cis)
            seen = attend(qkv, self._heads, config.head_dim, config.attention_scale, plans, number, block.kind.window)
            x = self._joined(x, block.out, seen, block.after_attention)
            x = self._joined(x, block.mlp, self._normed(x, block.middle), block.after_mlp)
        return x

    def final(self, x: torch.Tensor) -> torch.Tensor:
        """The last norm."""
        return F.rms_norm(x, (self._config.hidden,), self._norm, self._config.eps)

    def logits(self, x: torch.Tensor, count: int) -> torch.Tensor | None:
        """x: what `final` gave. Of its first rows: [count, vocabulary] float32 on rank 0, None elsewhere."""
        assert self._head is not None, "an embedding model has no head"
        mine = self._head(x.to(self._dtype))[:count].float()
        if self._summer is None:
            return mine
        parts = self._summer.gather(mine)
        return None if parts is None else torch.cat(parts, dim=-1)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._summer is None:
            x = F.embedding(tokens, self._embedding).float()
        else:
            local = tokens - self._vocabulary.start
            foreign = (local < 0) | (local >= self._vocabulary.size)
            if self._vocabulary.size:
                x = F.embedding(local.masked_fill(foreign, 0), self._embedding).float()
                x.masked_fill_(foreign.unsqueeze(1), 0.0)
            else:
                x = torch.zeros(len(tokens), self._config.hidden, device=tokens.device)
            self._summer.all_reduce(x)
        return x * self._config.embedding_scale if self._config.embedding_scale != 1.0 else x

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        h = F.rms_norm(x, (x.shape[1],), weight, self._config.eps)
        return h if h.dtype == self._dtype else h.to(self._dtype)

    def _turn(self, qkv: torch.Tensor, block: Block, cis: Sequence[torch.Tensor]) -> None:
        """Queries and keys normed and turned, in place."""
        if block.qk_norm is None and block.kind.rope is None:
            return
        d = self._config.head_dim
        there = qkv[:, : self._turned]
        both = there.unflatten(1, (-1, d)).float()  # no copy where it is float32
        if block.qk_norm is not None:
            both = F.rms_norm(both, (d,), None, self._config.eps).mul_(block.qk_norm)
        if block.kind.rope is not None:
            torch.view_as_complex(both.unflatten(2, (-1, 2))).mul_(cis[block.kind.rope])
        if block.qk_norm is not None or qkv.dtype != torch.float32:
            there.copy_(both.flatten(1))

    def _joined(
        self, x: torch.Tensor, part: Linear | Mlp | RoutedMlp, h: torch.Tensor, norm: torch.Tensor | None
    ) -> torch.Tensor:
        """x and what the part makes of h, over all ranks."""
        summer = self._summer
        if norm is None:
            y = part(h, x if summer is None or summer.rank == 0 else None)
            if summer is not None:
                y = y.float()
                summer.all_reduce(y)
            return y
        y = part(h).float()
        if summer is not None:
            summer.all_reduce(y)
        return x + F.rms_norm(y, (x.shape[1],), norm, self._config.eps)
