"""A model's shape, as far as memory depends on it: bytes per layer, and what each layer keeps per token or per slot.

The rules are llama.cpp's own (llama-hparams, llama-kv-cache, llama-kv-cache-iswa). Where an architecture is not known
here, attention is counted as full attention: an estimate may be too high, never too low.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from helexa.neuron.harness.llama.header import Header

# Architectures without a cache: they read the whole input at once.
ENCODERS: Final = frozenset(
    {
        "bert",
        "nomic-bert",
        "nomic-bert-moe",
        "neo-bert",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "eurobert",
        "gemma-embedding",
        "t5encoder",
    }
)

# Every n-th layer attends to everything, the others to a window (set_swa_pattern in the engine). A file's own
# `attention.sliding_window_pattern` goes before.
SWA_PERIOD: Final = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "cohere2": 4,
    "exaone4": 4,
    "olmo2": 4,
    "smallthinker": 4,
    "llama4": 4,
}

# What the engine repacks for the CPU's wide instructions, into memory of its own.
REPACKED_TYPES: Final = frozenset({"Q4_0", "Q4_K", "IQ4_NL"})


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer: its weights, and what it keeps. k_row and v_row are elements per token of context."""

    weight_bytes: int
    k_row: int
    v_row: int
    windowed: bool
    state_bytes: int  # per slot, whatever the context (recurrent layers)


@dataclass(frozen=True, slots=True)
class Geometry:
    layers: tuple[LayerShape, ...]
    input_bytes: int  # token embeddings: they stay with the CPU
    output_bytes: int  # the head, and its copy where it is tied to the embeddings
    repacked_bytes: int
    window: int | None
    n_embd: int
    n_ff: int
    n_head: int
    head_widths: tuple[int, int]  # of K and of V, elements
    n_vocab: int
    encoder: bool
    active_params: int  # multiplied per token of a prompt: no embeddings, of the experts those that are used

    @property
    def weight_bytes(self) -> int:
        """All tensors, each once."""
        return self.input_bytes + self.output_bytes + sum(layer.weight_bytes for layer in self.layers)


class Keys:
    """A model's metadata under its architecture's prefix; scalars that may also be one value per layer."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata
        self.architecture = str(metadata.get("general.architecture", ""))

    def get(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{name}", default)

    def number(self, name: str, default: int = 0) -> int:
        """One number; the largest of an array."""
        value = self.get(name, default)
        if isinstance(value, list):
            value = max((v for v in value if isinstance(v, int)), default=default)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default

    def per_layer(self, name: str, layers: int, default: int) -> list[int]:
        value = self.get(name, default)
        if isinstance(value, list):
            numbers = [v if isinstance(v, int) and v >= 0 else default for v in value[:layers]]
            return numbers + [default] * (layers - len(numbers))
        return [value if isinstance(value, int) and value >= 0 else default] * layers


def read_geometry(headers: tuple[Header, ...]) -> Geometry:
    keys = Keys(headers[0].metadata)
    tensors = [tensor for header in headers for tensor in header.tensors]
    layer_count = min(keys.number("block_count"), 4096)
    weights = [0] * layer_count
    input_bytes = output_bytes = repacked = active = 0
    experts, used = keys.number("expert_count"), keys.number("expert_used_count")
    for tensor in tensors:
        layer = _layer_of(tensor.name)
        if layer is not None and layer < layer_count:
            weights[layer] += tensor.size
            active += tensor.elements * used // experts if experts and "_exps" in tensor.name else tensor.elements
        elif tensor.name.startswith(("output", "cls", "rope_")):
            output_bytes += tensor.size
        else:
            input_bytes += tensor.size
        if tensor.type_name in REPACKED_TYPES and len(tensor.shape) > 1 and tensor.shape[1] % 8 == 0:
            repacked += tensor.size

    n_embd = keys.number("embedding_length")
    heads = keys.per_layer("attention.head_count", layer_count, 1)
    n_head = max(heads, default=1) or 1
    encoder = keys.architecture in ENCODERS
    widths = _head_widths(keys, n_embd // n_head)
    rows = [(0, 0)] * layer_count if encoder else _cache_rows(keys, layer_count, heads, widths)
    windowed = _windowed(keys, layer_count)
    state = _state_bytes(keys)
    shapes = tuple(
        LayerShape(weights[i], rows[i][0], rows[i][1], windowed[i], 0 if rows[i][0] or encoder else state)
        for i in range(layer_count)
    )
    return Geometry(
        layers=shapes,
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        repacked_bytes=repacked,
        window=keys.number("attention.sliding_window") or None if any(windowed) else None,
        n_embd=n_embd,
        n_ff=max(keys.number("feed_forward_length"), keys.number("expert_feed_forward_length")),
        n_head=n_head,
        head_widths=widths,
        n_vocab=headers[0].lengths.get("tokenizer.ggml.tokens", keys.number("vocab_size")),
        encoder=encoder,
        active_params=active,
    )


def _layer_of(name: str) -> int | None:
    if not name.startswith("blk."):
        return None
    number = name[4:].partition(".")[0]
    return int(number) if number.isdigit() and len(number) < 6 else None


def _head_widths(keys: Keys, default: int) -> tuple[int, int]:
    return (
        keys.number("attention.key_length", default) or default,
        keys.number("attention.value_length", default) or default,
    )


def _cache_rows(keys: Keys, layers: int, heads: list[int], widths: tuple[int, int]) -> list[tuple[int, int]]:
    """Elements of K and of V that each layer keeps per token."""
    given = keys.get("attention.head_count_kv") is not None
    kv_heads = keys.per_layer("attention.head_count_kv", layers, 0) if given else heads
    interval = keys.number("full_attention_interval")
    if interval > 1:  # every n-th layer attends, the others are recurrent (qwen3next)
        kv_heads = [kv if (i + 1) % interval == 0 else 0 for i, kv in enumerate(kv_heads)]
    return [(kv * widths[0], kv * widths[1]) for kv in kv_heads]


def _windowed(keys: Keys, layers: int) -> list[bool]:
    if not keys.number("attention.sliding_window"):
        return [False] * layers
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, list) and pattern:
        return [bool(pattern[i % len(pattern)]) for i in range(layers)]
    known = SWA_PERIOD.get(keys.architecture, 1)
    period = pattern if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0 else known
    if keys.architecture == "smallthinker":  # the first of each group attends to everything, not the last
        return [i % period != 0 for i in range(layers)]
    return [(i + 1) % period != 0 for i in range(layers)]


def _state_bytes(keys: Keys) -> int:
    """What a recurrent layer keeps per slot, f32 (mamba and its kin)."""
    inner, conv = keys.number("ssm.inner_size"), keys.number("ssm.conv_kernel")
    state, groups = keys.number("ssm.state_size"), keys.number("ssm.group_count")
    if inner:
        return 4 * (max(conv - 1, 0) * (inner + 2 * groups * state) + state * inner)
    head = keys.number("wkv.head_size")
    if head:
        return 4 * keys.number("embedding_length") * (head + 2)
    return 0
