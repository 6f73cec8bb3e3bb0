"""Attention of the rows of a step over their slabs.

A row's new tokens come last in what its slab then holds. Query heads are grouped by the KV head that they read, so that
keys and values are never copied for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from helexa.neuron.harness.torch.config import Heads
from helexa.neuron.harness.torch.kv import Slabs, Views
from helexa.neuron.harness.torch.step import Row


@dataclass(frozen=True, slots=True)
class Seen:
    """What layers of one window see of a row. mask None and causal False: each of its tokens sees all of it."""

    first: int
    mask: torch.Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class RowPlan:
    """begin, count: its tokens among the step's."""

    begin: int
    count: int
    views: Views
    seen: dict[int | None, Seen]  # by window


def plan_rows(rows: Sequence[Row], windows: Sequence[int | None], slabs: Slabs, dtype: torch.dtype) -> list[RowPlan]:
    """Once a step. The slabs have room already."""
    plans, begin = [], 0
    for row in rows:
        count, end = len(row.tokens), row.start + len(row.tokens)
        seen = {window: _seen(row.start, end, window, slabs.device, dtype) for window in windows}
        firsts = sorted({one.first for one in seen.values()})
        plans.append(RowPlan(begin, count, slabs.views(row.slab, row.start, end, firsts), seen))
        begin += count
    return plans


def _seen(start: int, end: int, window: int | None, device: torch.device, dtype: torch.dtype) -> Seen:
    first = 0 if window is None else max(0, start + 1 - window)
    if end - start == 1:
        return Seen(first, None, causal=False)
    if start == 0 and (window is None or end <= window):
        return Seen(0, None, causal=True)
    tokens = torch.arange(start, end, device=device).unsqueeze(1)
    keys = torch.arange(first, end, device=device)
    visible = keys <= tokens
    if window is not None:
        visible &= keys > tokens - window
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
    return Seen(first, mask, causal=False)


def attend(
    qkv: torch.Tensor,
    heads: Heads,
    head_dim: int,
    scale: float,
    plans: Sequence[RowPlan],
    layer: int,
    window: int | None,
) -> torch.Tensor:
    """HOT, once a layer. qkv: [n, (queries + 2 * kv) * head_dim], queries and keys turned. The new keys and values are
    written to the slabs. Returns [n, queries * head_dim]."""
    kv, group = len(heads.kv), heads.per_kv
    width = heads.queries * head_dim
    alone = len(plans) == 1 and plans[0].count == qkv.shape[0]
    out = None if alone else qkv.new_zeros(qkv.shape[0], width)
    for plan in plans:
        mine = qkv if alone else qkv.narrow(0, plan.begin, plan.count)
        count = plan.count
        plan.views.write[layer].copy_(mine[:, width:].view(count, 2, kv, head_dim).permute(1, 2, 0, 3))
        seen = plan.seen[window]
        keys, values = plan.views.keys[seen.first][layer], plan.views.values[seen.first][layer]
        if count == 1:  # the queries of a group stand where a sequence's tokens would
            query = mine[:, :width].view(1, kv, group, head_dim)
            got = F.scaled_dot_product_attention(query, keys.unsqueeze(0), values.unsqueeze(0), scale=scale)
            got = got.reshape(1, width)
        else:
            query = mine[:, :width].view(count, kv, group, head_dim).permute(1, 2, 0, 3)
            shape = (kv, group, keys.shape[1], head_dim)
            got = F.scaled_dot_product_attention(
                query,
                keys.unsqueeze(1).expand(shape),
                values.unsqueeze(1).expand(shape),
                attn_mask=seen.mask,
                is_causal=seen.causal,
                scale=scale,
            )
            got = got.permute(2, 0, 1, 3).reshape(count, width)
        if out is None:
            return got
        out[plan.begin : plan.begin + count] = got
    assert out is not None
    return out
