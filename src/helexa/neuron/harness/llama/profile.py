"""A profile's options made concrete for llama.cpp: every default chosen, every impossible value refused by name.

Pure but for `default_threads`, which asks the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from helexa.core.errors import BadRequest
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import ModelFacts
from helexa.neuron.harness.cores import MAX_THREADS, default_threads
from helexa.neuron.harness.llama.geometry import Geometry
from helexa.neuron.harness.profiles import within

KV_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
KV_QUANTISED: Final = frozenset({"q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"})
KV_BLOCK: Final = 32  # elements that a quantised type packs together; none may cross a head
MAX_SLOTS: Final = 256
CONTEXT_STEP: Final = 256  # the engine rounds a slot's context up to this
DEFAULT_SLOTS: Final = 4
DEFAULT_CONTEXT: Final = 32_768
DEFAULT_EMBED_CONTEXT: Final = 8192  # one input; all of it goes through in one batch, whose buffers grow with it
MIN_BATCH: Final = 8  # n_batch = 1 ends the engine with an assertion
MAX_BATCH: Final = 2048
MAX_BATCH_CPU: Final = 512

# A request is given up between two batches, so one batch must not take longer than this (a client that leaves during
# prefill frees its slot within 1.5 s; other requests' decoding waits no longer either).
BATCH_SECONDS: Final = 0.5
# Parameters times prompt tokens a second, measured: SmolLM2 on two AVX2 cores; and what an RTX 3060 is known to do.
CPU_RATE_PER_THREAD: Final = 1.0e10
GPU_RATE: Final = 6.0e12


@dataclass(frozen=True, slots=True)
class Options:
    """What the engine is told, apart from paths and from what depends on the devices' free memory."""

    slots: int
    kv_type: str
    kv_unified: bool
    flash_attention: bool | None
    threads: int
    batch: int
    prompt_cache_mb: int | None  # None: chosen with the memory of the KV cache in sight


def choose(request: LoadRequest, facts: ModelFacts, *, on_gpu: bool) -> Options:
    """Raises BadRequest, naming the option, for what is impossible whatever the memory."""
    geometry: Geometry = facts.extra["geometry"]
    pooled = facts.task in ("embed", "rerank")
    slots = within("slots", request.slots, 1, MAX_SLOTS, DEFAULT_SLOTS)
    within("context", request.context, 1, facts.n_ctx_train, 0, "the context that the model was trained for")
    within("gpu_layers", request.gpu_layers, 0, 1 << 20, 0)
    within("tensor_parallel", request.tensor_parallel, 1, 16, 1)
    within("min_devices", request.min_devices, 1, 16, 1)
    within("prompt_cache_mb", request.prompt_cache_mb, 0, 1 << 24, 0)
    threads = within("threads", request.threads, 1, MAX_THREADS, 0) or default_threads()
    kv_type = request.kv_cache or "f16"
    if kv_type not in KV_TYPES:
        raise BadRequest(f'kv_cache = "{kv_type}" is not known; use one of {", ".join(KV_TYPES)}', param="kv_cache")
    if kv_type in KV_QUANTISED:
        if request.flash_attention is False:
            message = f'kv_cache = "{kv_type}" needs flash attention: leave flash_attention out, or use f16'
            raise BadRequest(message, param="kv_cache")
        if any(width % KV_BLOCK for width in geometry.head_widths):
            message = f'kv_cache = "{kv_type}": this model\'s heads are not a multiple of {KV_BLOCK} wide; use f16'
            raise BadRequest(message, param="kv_cache")
    if request.draft is not None and pooled:
        raise BadRequest(f"draft: a model that does {facts.task} generates nothing to be drafted", param="draft")
    if request.projector is not None and pooled:
        raise BadRequest(f"projector: a model whose task is {facts.task} takes no images", param="projector")
    draft: Geometry | None = facts.extra.get("draft")
    if draft is not None and draft.n_vocab != geometry.n_vocab:
        message = (
            f"draft: its vocabulary has {draft.n_vocab} tokens, the model's has {geometry.n_vocab}: they must match"
        )
        raise BadRequest(message, param="draft")
    if not pooled:
        batch = within("batch", request.batch, MIN_BATCH, 1 << 16, 0) or default_batch(geometry, threads, on_gpu)
    else:
        batch = within("batch", request.batch, MIN_BATCH, 1 << 16, 0)
    return Options(
        slots=slots,
        kv_type=kv_type,
        kv_unified=bool(request.kv_unified),
        flash_attention=request.flash_attention,
        threads=threads,
        batch=batch,
        prompt_cache_mb=0 if pooled else request.prompt_cache_mb,
    )


def default_batch(geometry: Geometry, threads: int, on_gpu: bool) -> int:
    """The largest power of two of which one batch should take at most BATCH_SECONDS."""
    rate = GPU_RATE if on_gpu else CPU_RATE_PER_THREAD * threads
    tokens = int(BATCH_SECONDS * rate / max(geometry.active_params, 1))
    high = MAX_BATCH if on_gpu else MAX_BATCH_CPU
    return min(max(1 << max(tokens, 1).bit_length() - 1, MIN_BATCH), high)
