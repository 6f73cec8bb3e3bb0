"""A rank's decoder out of its weights: cast, fused, brought into the order that the decoder computes in."""

from __future__ import annotations

from typing import Final

import torch

from helexa.neuron.harness.torch.config import ModelConfig, Unsupported, heads_of
from helexa.neuron.harness.torch.decoder import Block, Decoder, Summer
from helexa.neuron.harness.torch.experts import Mlp, RoutedMlp
from helexa.neuron.harness.torch.layout import expert_names, router_name
from helexa.neuron.harness.torch.linear import Dense, Linear, make_linear
from helexa.neuron.harness.torch.rope import paired
from helexa.neuron.harness.torch.weights import Weights
from helexa.neuron.tp.partition import Share

COMPUTE: Final = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "int8": torch.bfloat16}


def build_decoder(
    config: ModelConfig, share: Share, weights: Weights, dtype: str, device: torch.device, summer: Summer | None
) -> Decoder:
    """Raises NotWhole, Unsupported, MemoryError."""
    if dtype == "int8" and device.type != "cpu":
        raise Unsupported("int8 weights: this engine multiplies with them on CPU only; on a GPU use bf16 or f16")
    builder = _Builder(config, share, weights, dtype, device, summer is None or summer.rank == 0)
    return builder.decoder(summer)


class _Builder:
    def __init__(
        self, config: ModelConfig, share: Share, weights: Weights, dtype: str, device: torch.device, first: bool
    ) -> None:
        self._config, self._share, self._weights = config, share, weights
        self._int8 = dtype == "int8"
        self._dtype, self._device = COMPUTE[dtype], device
        self._source = torch.float32 if self._int8 else self._dtype  # of matrices, before they are made linear layers
        self._first = first  # the rank that adds the biases of what is summed
        self._heads = heads_of(config, share)

    def decoder(self, summer: Summer | None) -> Decoder:
        config = self._config
        stored = self._weights.read("embed_tokens.weight")
        head: Linear | None = None
        if config.pooling is None and not config.tied:
            head = self._linear(self._held("lm_head.weight"))
        elif config.pooling is None:
            head = self._linear(stored.to(self._device, self._source, copy=True))
        if config.tied and isinstance(head, Dense):
            embedding = head.weight
        else:  # a table of its own, in what the file has where that is narrower
            narrow = stored.dtype if stored.dtype.itemsize < self._dtype.itemsize else self._dtype
            embedding = stored.to(self._device, narrow, copy=True)
        blocks = [self._block(number) for number in range(len(config.layers))]
        norm = self._norm("norm.weight")
        return Decoder(config, self._heads, self._share.vocabulary, embedding, blocks, norm, head, self._dtype, summer)

    def _block(self, number: int) -> Block:
        config, at = self._config, f"layers.{number}."
        kind = config.layers[number]
        middle = "pre_feedforward_layernorm" if config.sandwich else "post_attention_layernorm"
        return Block(
            kind=kind,
            before=self._norm(f"{at}input_layernorm.weight"),
            qkv=self._qkv(at),
            qk_norm=self._qk_norm(at) if config.qk_norm else None,
            out=self._summed(f"{at}self_attn.o_proj", config.out_bias),
            middle=self._norm(f"{at}{middle}.weight"),
            mlp=self._routed(number) if kind.experts else self._mlp(at),
            after_attention=self._norm(f"{at}post_attention_layernorm.weight") if config.sandwich else None,
            after_mlp=self._norm(f"{at}post_feedforward_layernorm.weight") if config.sandwich else None,
        )

    def _qkv(self, at: str) -> Linear:
        weight = torch.cat([self._attention_part(f"{at}self_attn.{part}_proj.weight", part) for part in "qkv"])
        bias = None
        if self._config.qkv_bias:
            bias = torch.cat([self._attention_part(f"{at}self_attn.{part}_proj.bias", part) for part in "qkv"]).to(
                self._dtype
            )
        return self._linear(weight, bias)

    def _attention_part(self, name: str, part: str) -> torch.Tensor:
        """part: q | k | v. Keys and values are repeated where the heads say so."""
        d = self._config.head_dim
        rows = self._held(name)
        if part != "q":
            first = self._share.kv_heads.start
            heads = [kv - first for kv in self._heads.kv]
            if heads != list(range(self._share.kv_heads.size)):
                rows = rows.unflatten(0, (-1, d))[heads].flatten(0, 1)
        return rows if part == "v" else paired(rows, d)

    def _qk_norm(self, at: str) -> torch.Tensor:
        d = self._config.head_dim
        counts = (("q", self._heads.queries), ("k", len(self._heads.kv)))
        return torch.cat(
            [paired(self._norm(f"{at}self_attn.{part}_norm.weight"), d).expand(n, d) for part, n in counts]
        )

    def _mlp(self, at: str) -> Mlp:
        names = [f"{at}mlp.{part}_proj" for part in ("gate", "up")]
        weight = torch.cat([self._held(f"{name}.weight") for name in names])
        bias = torch.cat([self._small(f"{name}.bias") for name in names]) if self._config.mlp_bias else None
        down = self._summed(f"{at}mlp.down_proj", self._config.mlp_bias)
        return Mlp(self._linear(weight, bias), down, len(weight) // 2, self._config.activation)

    def _routed(self, number: int) -> RoutedMlp:
        config = self._config
        assert config.experts is not None
        experts = {}
        for expert in range(self._share.experts.start, self._share.experts.stop):
            gate, up, down = (self._held(name) for name in expert_names(config, number, expert))
            both = self._linear(torch.cat([gate, up]))
            experts[expert] = Mlp(both, self._linear(down), config.experts.width, config.activation)
        return RoutedMlp(config.experts, self._small(router_name(config, number)), experts)

    def _summed(self, name: str, biased: bool) -> Linear:
        """A layer whose output is summed over the ranks."""
        bias = self._small(f"{name}.bias") if biased and self._first else None
        return self._linear(self._held(f"{name}.weight"), bias)

    def _linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        return make_linear(weight, bias, int8=self._int8)

    def _norm(self, name: str) -> torch.Tensor:
        return self._weights.read(name).to(self._device, torch.float32) + self._config.norm_offset

    def _held(self, name: str) -> torch.Tensor:
        """A copy: what is read may be a view of the file."""
        return self._weights.read(name).to(self._device, self._source, copy=True)

    def _small(self, name: str) -> torch.Tensor:
        """A bias or a router, which no form of weights makes narrower than what is computed in."""
        return self._weights.read(name).to(self._device, self._dtype, copy=True)
