"""Which tensors a model has, of what shape, and which part of each a rank holds. Pure; imports no torch.

One table serves the check of the files, the estimate of memory and the load, so that they cannot disagree. Linear
layers that make heads or MLP columns are cut by rows, those that take them in by columns; embedding and head by rows of
the vocabulary; experts are whole. Norms, the router, and biases of what is summed over ranks are whole on each rank
(of such a bias rank 0 alone makes use).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from helexa.neuron.harness.torch.config import ModelConfig
from helexa.neuron.harness.torch.safetensors_files import NotWhole, Stored
from helexa.neuron.tp.partition import Share, Span

# Before the names of a decoder's tensors, and before its head's.
_PREFIXES: Final = (
    ("model.", ""),
    ("", ""),
    ("language_model.model.", "language_model."),
    ("model.language_model.", ""),
)
_EXPERT_NAMES: Final = {
    "qwen": ("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
}
_STORED_BYTES: Final = {"bfloat16": 2, "float16": 2}
ELEMENT_BYTES: Final = {"f32": 4, "bf16": 2, "f16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, and the part of it that one rank reads: `span` of dimension `cut`, or all of it.

    kind: linear | embedding | small (norms, biases, routers: never quantised)
    """

    shape: tuple[int, ...]
    kind: str
    cut: int | None = None
    span: Span | None = None

    @property
    def held(self) -> tuple[int, ...]:
        if self.cut is None or self.span is None:
            return self.shape
        return (*self.shape[: self.cut], self.span.size, *self.shape[self.cut + 1 :])


def expert_names(config: ModelConfig, layer: int, expert: int) -> tuple[str, str, str]:
    """Of gate, up and down."""
    _, experts, *parts = _EXPERT_NAMES[config.expert_names]
    gate, up, down = (f"layers.{layer}.{experts}.{expert}.{part}.weight" for part in parts)
    return gate, up, down


def router_name(config: ModelConfig, layer: int) -> str:
    return f"layers.{layer}.{_EXPERT_NAMES[config.expert_names][0]}.weight"


def pieces(config: ModelConfig, share: Share) -> Iterator[tuple[str, Piece]]:
    """Every tensor that the rank with this share reads, by its name without the model's prefix."""
    hidden, d = config.hidden, config.head_dim
    yield "embed_tokens.weight", Piece((config.vocabulary, hidden), "embedding", 0, share.vocabulary)
    if not config.tied and config.pooling is None:
        yield "lm_head.weight", Piece((config.vocabulary, hidden), "linear", 0, share.vocabulary)
    yield "norm.weight", Piece((hidden,), "small")
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.sandwich:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for i, layer in enumerate(config.layers):
        at = f"layers.{i}."
        for norm in norms:
            yield f"{at}{norm}.weight", Piece((hidden,), "small")
        queries = _times(share.query_heads, d)
        keys = _times(share.kv_heads, d)
        for part, heads, span in (
            ("q", config.query_heads, queries),
            ("k", config.kv_heads, keys),
            ("v", config.kv_heads, keys),
        ):
            yield f"{at}self_attn.{part}_proj.weight", Piece((heads * d, hidden), "linear", 0, span)
            if config.qkv_bias:
                yield f"{at}self_attn.{part}_proj.bias", Piece((heads * d,), "small", 0, span)
        yield f"{at}self_attn.o_proj.weight", Piece((hidden, config.query_heads * d), "linear", 1, queries)
        if config.out_bias:
            yield f"{at}self_attn.o_proj.bias", Piece((hidden,), "small")
        if config.qk_norm:
            yield f"{at}self_attn.q_norm.weight", Piece((d,), "small")
            yield f"{at}self_attn.k_norm.weight", Piece((d,), "small")
        if layer.experts and config.experts:
            yield router_name(config, i), Piece((config.experts.count, hidden), "small")
            for expert in range(share.experts.start, share.experts.stop):
                gate, up, down = expert_names(config, i, expert)
                yield gate, Piece((config.experts.width, hidden), "linear")
                yield up, Piece((config.experts.width, hidden), "linear")
                yield down, Piece((hidden, config.experts.width), "linear")
            continue
        for part in ("gate", "up"):
            yield f"{at}mlp.{part}_proj.weight", Piece((config.mlp, hidden), "linear", 0, share.mlp)
            if config.mlp_bias:
                yield f"{at}mlp.{part}_proj.bias", Piece((config.mlp,), "small", 0, share.mlp)
        yield f"{at}mlp.down_proj.weight", Piece((hidden, config.mlp), "linear", 1, share.mlp)
        if config.mlp_bias:
            yield f"{at}mlp.down_proj.bias", Piece((hidden,), "small")


def full_name(name: str, found: Mapping[str, Stored]) -> str:
    """As the files have it. Raises NotWhole where they have no embedding, by which the prefix is told."""
    for prefix, of_head in _PREFIXES:
        if f"{prefix}embed_tokens.weight" in found:
            return f"{of_head}{name}" if name.startswith("lm_head.") else f"{prefix}{name}"
    raise NotWhole("tensor model.embed_tokens.weight is in none of the model's files")


def weight_bytes(config: ModelConfig, share: Share, dtype: str, *, on_gpu: bool = False) -> int:
    """What the rank with this share holds of weights, in f32, bf16, f16 or int8. On a GPU a tied head is its
    embedding; on a CPU it is packed, and the embedding a table beside it, no wider than the file has it."""
    table = min(_STORED_BYTES.get(config.stored or "", 4), ELEMENT_BYTES["bf16" if dtype == "int8" else dtype])
    total = 0
    for _, piece in pieces(config, share):
        count = math.prod(piece.held)
        if piece.kind == "small":
            total += count * 4
        elif piece.kind == "linear" or on_gpu:
            total += count * ELEMENT_BYTES[dtype]
        else:
            packed_too = config.tied and config.pooling is None
            total += count * (table + (ELEMENT_BYTES[dtype] if packed_too else 0))
    return total


def _times(span: Span, width: int) -> Span:
    return Span(span.start * width, span.stop * width)
