"""What a model will take on each device, before it is loaded. Pure arithmetic on a Geometry.

Weights and KV cache are exact (the engine's own rules); the overhead is calibrated against measured processes, on the
safe side. On a CPU device it is the whole host process; on a GPU it is what the engine takes there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from helexa.neuron.harness.llama.geometry import Geometry
from helexa.neuron.harness.llama.header import TYPES
from helexa.neuron.harness.llama.profile import CONTEXT_STEP

MB: Final = 1 << 20
HOST_BYTES: Final = 64 * MB  # interpreter, engine, server threads
VOCAB_BYTES: Final = 176  # per token of the vocabulary
CUDA_BYTES: Final = 420 * MB  # a CUDA context, cuBLAS and its workspace
PROMPT_CACHE_CEILING: Final = 512 * MB
CHECKPOINTS: Final = 4  # states kept per slot by models whose cache cannot be cut back (windows, recurrence)

_KV_SIZE: Final = {name.lower(): (block, size) for name, block, size in TYPES.values()}


@dataclass(frozen=True, slots=True)
class Load:
    """One way to load a model: what its memory depends on. context is per request."""

    geometry: Geometry
    context: int
    slots: int
    kv_type: str
    kv_unified: bool
    batch: int
    ubatch: int  # what goes through the layers at once
    flash_attention: bool | None
    prompt_cache_bytes: int | None
    extra_bytes: int  # projector, adapters
    draft: Geometry | None

    @property
    def streams(self) -> int:
        return 1 if self.kv_unified else self.slots


def in_mb(n: int) -> int:
    return -(-n // MB)


def padded(n: int, step: int = CONTEXT_STEP) -> int:
    return (n + step - 1) // step * step


def kv_bytes(load: Load, geometry: Geometry | None = None) -> list[int]:
    """Bytes of cache and state, for each layer."""
    geometry = geometry or load.geometry
    block, size = _KV_SIZE[load.kv_type]
    full = padded(load.context) * load.streams
    window = full
    if geometry.window:
        reach = geometry.window * (load.slots if load.kv_unified else 1) + load.ubatch
        window = padded(min(padded(load.context), reach)) * load.streams
    return [
        (layer.k_row + layer.v_row) * (window if layer.windowed else full) * size // block
        + layer.state_bytes * load.slots
        for layer in geometry.layers
    ]


def compute_bytes(load: Load) -> int:
    """The engine's working memory for one batch: activations, attention mask, scores where there is no flash
    attention, and the logits."""
    g = load.geometry
    per_token = 4 * (2 * g.n_ff + 12 * g.n_embd) + 2 * padded(load.context)
    if load.kv_unified:
        per_token += 2 * padded(load.context)
    if load.flash_attention is False:
        per_token += 4 * g.n_head * padded(load.context)
    return load.ubatch * per_token + 8 * load.slots * g.n_vocab


def checkpoint_bytes(load: Load) -> int:
    """Kept on the host for models with windows or recurrent layers, a few for each slot."""
    g = load.geometry
    per_slot = sum(
        layer.state_bytes + (layer.k_row + layer.v_row) * 2 * min(g.window or 0, load.context) * layer.windowed
        for layer in g.layers
    )
    count = min(CHECKPOINTS, 1 + load.context // 8192)
    return per_slot * load.slots * count


def prompt_cache_bytes(load: Load) -> int:
    """As much again as the slots' own cache, up to a ceiling, unless the profile says."""
    if load.prompt_cache_bytes is not None:
        return load.prompt_cache_bytes
    return min(sum(kv_bytes(load)), PROMPT_CACHE_CEILING)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on one device."""

    weights: int
    kv: int
    overhead: int

    @property
    def total_mb(self) -> int:
        """As an Estimate adds it up: each part rounded up."""
        return in_mb(self.weights) + in_mb(self.kv) + in_mb(self.overhead)


def need_on_cpu(load: Load) -> Need:
    weights = load.geometry.weight_bytes + load.extra_bytes
    kv = sum(kv_bytes(load))
    repacked = load.geometry.repacked_bytes if maps_file(load.geometry) else 0
    overhead = HOST_BYTES + load.geometry.n_vocab * VOCAB_BYTES + compute_bytes(load)
    overhead += prompt_cache_bytes(load) + checkpoint_bytes(load)
    if load.draft is not None:
        weights += load.draft.weight_bytes
        kv += sum(kv_bytes(load, load.draft))
        overhead += load.draft.n_vocab * VOCAB_BYTES
    return Need(weights + repacked, kv, overhead)


def need_on_gpus(load: Load, gpu_layers: int, shares: list[float]) -> list[Need]:
    """What each device takes, by the layers that the engine will put there (`layer_devices`)."""
    g = load.geometry
    kv = kv_bytes(load)
    needs = [[0, 0] for _ in shares]
    for layer, device in enumerate(layer_devices(len(g.layers), gpu_layers, shares)):
        if device is None:
            continue
        if layer < len(g.layers):
            needs[device][0] += g.layers[layer].weight_bytes
            needs[device][1] += kv[layer]
        else:  # the head; tied embeddings are copied for it
            needs[device][0] += g.output_bytes if g.output_bytes > MB else g.output_bytes + g.input_bytes
    first = next((i for i, share in enumerate(shares) if share > 0), 0)
    needs[first][0] += load.extra_bytes
    if load.draft is not None:
        needs[first][0] += load.draft.weight_bytes
        needs[first][1] += sum(kv_bytes(load, load.draft))
    overhead = CUDA_BYTES + compute_bytes(load)
    return [
        Need(weights, kv_here, overhead if share > 0 else 0)
        for (weights, kv_here), share in zip(needs, shares, strict=True)
    ]


def layer_devices(layers: int, gpu_layers: int, shares: list[float]) -> list[int | None]:
    """The device of each layer and of the head (the last entry), as the engine deals them out; None: the CPU."""
    total = sum(shares) or 1.0
    bounds, reached = [], 0.0
    for share in shares:
        reached += share / total
        bounds.append(reached)
    offloaded = min(gpu_layers, layers + 1)
    start = layers + 1 - offloaded
    found: list[int | None] = [None] * start
    for layer in range(start, layers + 1):
        position = (layer - start) / offloaded
        found.append(next((i for i, bound in enumerate(bounds) if position < bound), len(bounds) - 1))
    return found


def maps_file(geometry: Geometry) -> bool:
    """Whether a CPU load maps the file. Where the engine would repack (copy) more than a quarter of it, it is read
    instead: mapped and copied, those weights would count twice."""
    return geometry.repacked_bytes * 4 <= geometry.weight_bytes
