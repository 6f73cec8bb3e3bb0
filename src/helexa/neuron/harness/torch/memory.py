"""What a model takes on each rank, before it is loaded. Pure arithmetic on its description and the ranks' shares.

Weights and keys and values are exact; the overhead was measured on processes, on the safe side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from helexa.neuron.harness.torch.config import ModelConfig
from helexa.neuron.harness.torch.layout import weight_bytes
from helexa.neuron.tp.partition import Share

MB: Final = 1 << 20
HOST_BYTES: Final = 400 * MB  # interpreter, torch, its threads, tokenizer, packed weights
CUDA_BYTES: Final = 600 * MB  # a CUDA context, cuBLAS and its workspace
COLLECTIVE_BYTES: Final = 16 * MB
KV_ELEMENT: Final = {"f32": 4, "bf16": 2, "f16": 2, "int8": 2}  # int8 weights compute in bf16


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one rank. kv: of one token."""

    weights: int
    kv_per_token: int
    overhead: int

    def kv(self, tokens: int) -> int:
        return self.kv_per_token * tokens


def in_mb(n: int) -> int:
    return -(-n // MB)


def need_of(
    config: ModelConfig, share: Share, *, dtype: str, chunk: int, rows: int, context: int, ranks: int, on_gpu: bool
) -> Need:
    """On a GPU the device's memory alone, on a CPU the whole process."""
    base = (CUDA_BYTES if on_gpu else HOST_BYTES) + (COLLECTIVE_BYTES if ranks > 1 else 0)
    return Need(
        weights=weight_bytes(config, share, dtype, on_gpu=on_gpu),
        kv_per_token=config.kv_bytes_per_token(share, KV_ELEMENT[dtype]),
        overhead=base + compute_bytes(config, share, chunk, rows, 0 if on_gpu else context),
    )


def compute_bytes(config: ModelConfig, share: Share, chunk: int, rows: int, context: int) -> int:
    """One step's activations, its attention scores over a whole context (0 where the kernel keeps none), and the
    logits with their sorted copy."""
    wide = max(share.mlp.size, config.experts.width * config.experts.per_token if config.experts else 0)
    activations = chunk * (8 * config.hidden + 3 * wide + 4 * share.query_heads.size * config.head_dim)
    scores = chunk * context * max(1, share.query_heads.size // 4)
    logits = 3 * rows * config.vocabulary
    return 4 * (activations + scores + logits)
