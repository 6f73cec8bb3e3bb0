"""What a model is: one description that serves every family. Imports no torch.

The decoder asks only this description, never the architecture's name (families.py makes it from config.json).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from helexa.neuron.tp.partition import Shape, Share

LAST: Final = "last"
MEAN: Final = "mean"
FIRST: Final = "first"


class Unsupported(ValueError):
    """This engine does not serve such a model. str() says what of it, and what it does serve."""


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions turn queries and keys.

    kind: default | linear | llama3 | yarn; the fields below it are read by those that have them
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0  # llama3, yarn: what the model was trained on before it was stretched
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0  # cosines and sines are multiplied by it


@dataclass(frozen=True, slots=True)
class Experts:
    """Of a layer whose MLP is routed. renormalised: the chosen experts' weights are made to sum to 1."""

    count: int
    per_token: int
    width: int
    renormalised: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """window: how many positions attention sees, the token's own counted; None is all. rope: an index into `ropes`;
    None turns nothing."""

    window: int | None = None
    rope: int | None = 0
    experts: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    vocabulary: int
    hidden: int
    mlp: int  # columns of a dense layer's MLP; 0 where every layer has experts
    query_heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    context: int  # positions it was made for
    eps: float
    activation: str  # silu | gelu_tanh
    attention_scale: float
    experts: Experts | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys are normed head by head before they are turned
    sandwich: bool = False  # norms after attention and MLP too, before their sums
    norm_offset: float = 0.0  # what is added to a norm's weights
    embedding_scale: float = 1.0
    tied: bool = False  # the head is the embedding
    expert_names: str = "qwen"  # qwen | mixtral: how the files name experts
    stored: str | None = None  # the dtype that the weights are said to be in, such as "bfloat16"
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pooling: str | None = None  # last | mean | first for an embedding model, else None
    normalised: bool = True  # of an embedding model: its vectors have length 1
    also_sees: bool = False  # the text part of a model that also takes images

    @property
    def shape(self) -> Shape:
        """What is dealt out to ranks."""
        experts = self.experts.count if self.experts else 0
        return Shape(self.query_heads, self.kv_heads, self.mlp, self.vocabulary, experts)

    def kv_bytes_per_token(self, share: Share, element_bytes: int) -> int:
        """On the rank that has this share."""
        return 2 * len(self.layers) * len(heads_of(self, share).kv) * self.head_dim * element_bytes


@dataclass(frozen=True, slots=True)
class Heads:
    """A rank's attention. queries are `per_kv` to each of `kv`, which names for each the model's KV head.

    Where a group is split unevenly, a KV head is held once for each query head that reads it: attention then needs no
    copy of the context a step.
    """

    queries: int
    kv: tuple[int, ...]
    per_kv: int


def heads_of(config: ModelConfig, share: Share) -> Heads:
    per_group = config.query_heads // config.kv_heads
    readers = [query // per_group for query in range(share.query_heads.start, share.query_heads.stop)]
    counts = {kv: readers.count(kv) for kv in dict.fromkeys(readers)}
    if len(set(counts.values())) == 1:
        return Heads(len(readers), tuple(counts), next(iter(counts.values())))
    return Heads(len(readers), tuple(readers), 1)
