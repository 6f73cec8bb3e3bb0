"""A profile's options made concrete for the torch engine: defaults chosen, what cannot be refused by name.

Pure but for `default_threads` and `cpu_flags`, which ask the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from helexa.core.errors import BadRequest
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import ModelFacts
from helexa.neuron.harness.cores import MAX_THREADS, cpu_flags, default_threads
from helexa.neuron.harness.profiles import within
from helexa.neuron.harness.torch.config import ModelConfig
from helexa.neuron.harness.torch.facts import active_parameters

DTYPES: Final = ("f32", "bf16", "f16", "int8")
MAX_SLOTS: Final = 256
MAX_RANKS: Final = 16
DEFAULT_SLOTS: Final = 4
DEFAULT_CONTEXT: Final = 32_768
DEFAULT_EMBED_CONTEXT: Final = 8192
ROWS: Final = 8  # requests that are computed at once at least: `n`, and prompts of one request, want more than slots

# Nobody is heard within a step, so that one must not take longer than this: a client that left, a new request.
STEP_SECONDS: Final = 0.4
# Parameters times prompt tokens a second: a bare f32 forward of SmolLM2 on two AVX2 cores had 495 tok/s.
CPU_RATE_PER_THREAD: Final = 3.0e10
GPU_RATE: Final = 6.0e12
MIN_CHUNK: Final = 32
MAX_CHUNK_CPU: Final = 512
MAX_CHUNK: Final = 2048

# Options of other engines: nothing here does what they say.
_OTHERS: Final = ("gpu_layers", "flash_attention", "draft", "projector", "lora")
_FAST_BF16: Final = frozenset({"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True, slots=True)
class Options:
    """What the engine is told, apart from what depends on the devices' free memory. context: None: as fits."""

    slots: int
    rows: int
    dtype: str
    threads: int
    chunk: int
    prompt_cache_mb: int
    world_size: int | None


def choose(request: LoadRequest, facts: ModelFacts, *, on_gpu: bool) -> Options:
    """Raises BadRequest, naming the option, for what is impossible whatever the memory."""
    for name in _OTHERS:
        if getattr(request, name) is not None:
            raise BadRequest(f"{name} is not supported by the torch engine; leave it out", param=name)
    config: ModelConfig = facts.extra["config"]
    dtype = _dtype(request, config, on_gpu=on_gpu)
    slots = within("slots", request.slots, 1, MAX_SLOTS, DEFAULT_SLOTS)
    within("context", request.context, 1, facts.n_ctx_train, 0, "the context that the model was trained for")
    threads = within("threads", request.threads, 1, MAX_THREADS, 0) or default_threads()
    chunk = within("batch", request.batch, 1, 1 << 16, 0) or default_chunk(config, threads, on_gpu=on_gpu)
    ranks = request.tensor_parallel
    if ranks is None and request.shares is not None:
        ranks = len(request.shares)
    if ranks is None and request.devices is not None:
        ranks = len(request.devices)
    return Options(
        slots=slots,
        rows=max(slots, ROWS),
        dtype=dtype,
        threads=threads,
        chunk=chunk,
        prompt_cache_mb=request.prompt_cache_mb or 0,
        world_size=within("tensor_parallel", ranks, 1, MAX_RANKS, 1) if ranks is not None else None,
    )


def _dtype(request: LoadRequest, config: ModelConfig, *, on_gpu: bool) -> str:
    """1. What the profile says. 2. On a GPU two bytes, as the file has them. 3. On a CPU bf16 where it computes in
    it, else f32: elsewhere its prefill takes five times as long."""
    wanted = request.quant.lower() if request.quant is not None else None
    if wanted is not None and wanted not in DTYPES:
        raise BadRequest(
            f'quant = "{request.quant}" is no form that the torch engine loads; use one of {", ".join(DTYPES)}, or '
            "leave it out",
            param="quant",
        )
    dtype = wanted or _fast_dtype(config, on_gpu=on_gpu)
    kept = "bf16" if dtype == "int8" else dtype
    if request.kv_cache not in (None, kept):
        raise BadRequest(
            f'kv_cache = "{request.kv_cache}": the torch engine keeps what it computes in, {kept}; leave it out',
            param="kv_cache",
        )
    return dtype


def _fast_dtype(config: ModelConfig, *, on_gpu: bool) -> str:
    if on_gpu:
        return "f16" if config.stored == "float16" else "bf16"
    return "bf16" if config.stored == "bfloat16" and cpu_flags() & _FAST_BF16 else "f32"


def default_chunk(config: ModelConfig, threads: int, *, on_gpu: bool) -> int:
    """The largest multiple of 32 prompt tokens of which one step should take at most STEP_SECONDS."""
    rate = GPU_RATE if on_gpu else CPU_RATE_PER_THREAD * threads
    tokens = int(STEP_SECONDS * rate / max(active_parameters(config), 1))
    high = MAX_CHUNK if on_gpu else MAX_CHUNK_CPU
    return min(max(tokens - tokens % MIN_CHUNK, MIN_CHUNK), high)
