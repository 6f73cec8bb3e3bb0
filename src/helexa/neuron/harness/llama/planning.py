"""From a profile, a model's facts and the free memory to a Plan: which devices, how much context, how many layers.

Never raises for what does not fit: `estimate.why` says so, with the figures and the ways out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from helexa.core.errors import BadRequest
from helexa.core.lifecycle import DeviceEstimate, Estimate, LoadRequest
from helexa.neuron.harness.base import FreeDevice, ModelFacts, ModelFiles, Plan
from helexa.neuron.harness.llama.geometry import Geometry
from helexa.neuron.harness.llama.memory import (
    CHECKPOINTS,
    MB,
    Load,
    Need,
    in_mb,
    maps_file,
    need_on_cpu,
    need_on_gpus,
    prompt_cache_bytes,
)
from helexa.neuron.harness.llama.profile import (
    CONTEXT_STEP,
    DEFAULT_CONTEXT,
    DEFAULT_EMBED_CONTEXT,
    MIN_BATCH,
    Options,
    choose,
)
from helexa.neuron.harness.profiles import usable_devices

MAX_UBATCH = 512  # more gains nothing, and the engine's buffers grow with it
FLOOR_CONTEXT = 2048  # a context that nobody asked for is not cut below this to make it fit


@dataclass(frozen=True, slots=True)
class Placement:
    """Devices, and what goes where. gpu_layers counts the head as one more layer."""

    devices: tuple[FreeDevice, ...]
    gpu_layers: int
    shares: tuple[float, ...]


def plan(request: LoadRequest, files: ModelFiles, facts: ModelFacts, devices: Sequence[FreeDevice]) -> Plan:
    usable = _usable(request, devices)
    on_gpu = usable[0].kind != "cpu"
    options = choose(request, facts, on_gpu=on_gpu)
    geometry: Geometry = facts.extra["geometry"]
    gpu_layers = len(geometry.layers) + 1 if request.gpu_layers is None else request.gpu_layers
    gpu_layers = min(gpu_layers, len(geometry.layers) + 1) if on_gpu else 0
    load = Load(
        geometry=geometry,
        context=_wanted_context(request, facts),
        slots=options.slots,
        kv_type=options.kv_type,
        kv_unified=options.kv_unified,
        batch=options.batch,
        ubatch=min(options.batch, MAX_UBATCH),
        flash_attention=options.flash_attention,
        prompt_cache_bytes=None if options.prompt_cache_mb is None else options.prompt_cache_mb * MB,
        extra_bytes=facts.extra["projector_bytes"] + facts.extra["lora_bytes"],
        draft=facts.extra["draft"],
    )
    load, placement = _place(request, facts, load, usable, gpu_layers)
    needs = _needs(load, placement)
    ways = _ways_out(load, placement)
    why = _why(request, files, load, placement, needs, ways)
    return Plan(
        request=request,
        files=files,
        facts=facts,
        estimate=Estimate(
            devices=[
                DeviceEstimate(
                    index=device.index,
                    weights_mb=in_mb(need.weights),
                    kv_mb=in_mb(need.kv),
                    overhead_mb=in_mb(need.overhead),
                    free_mb=device.free_mb,
                )
                for device, need in zip(placement.devices, needs, strict=True)
            ],
            why=why,
            ways=ways if why is not None else [],
            context=load.context,
            slots=load.slots,
        ),
        context=load.context,
        slots=load.slots,
        device_indices=tuple(device.index for device in placement.devices),
        extra=_orders(request, facts, options, load, placement),
    )


def _orders(
    request: LoadRequest, facts: ModelFacts, options: Options, load: Load, placement: Placement
) -> dict[str, Any]:
    """What `engine.build_params` needs beside paths; JSON-able."""
    on_gpu = placement.devices[0].kind != "cpu"
    split = [0.0] * (max(d.index for d in placement.devices) + 1) if on_gpu else []
    for device, share in zip(placement.devices, placement.shares, strict=True):
        if on_gpu:
            split[device.index] = share
    return {
        "task": facts.task,
        "pooling": facts.extra["pooling"],
        "n_ctx": load.context * load.streams,
        "slots": load.slots,
        "kv_type": load.kv_type,
        "kv_unified": load.kv_unified,
        "flash_attention": load.flash_attention,
        "threads": options.threads,
        "batch": load.batch,
        "ubatch": load.ubatch,
        "gpu_layers": placement.gpu_layers,
        "tensor_split": split,
        "main_gpu": placement.devices[0].index if on_gpu else 0,
        "split": _split_mode(request, placement),
        "mmap": on_gpu or maps_file(load.geometry),
        "checkpoints": CHECKPOINTS,
        "prompt_cache_mb": in_mb(prompt_cache_bytes(load)),
        "chat_template": request.chat_template,
        "draft_gpu_layers": len(load.draft.layers) + 1 if load.draft is not None and placement.gpu_layers else 0,
    }


def _split_mode(request: LoadRequest, placement: Placement) -> str:
    if len(placement.devices) == 1:
        return "none"
    return "tensor" if (request.tensor_parallel or 1) > 1 else "layer"


def _wanted_context(request: LoadRequest, facts: ModelFacts) -> int:
    """The asked context in the engine's steps, or the default, before memory is looked at."""
    ceiling = DEFAULT_EMBED_CONTEXT if facts.task in ("embed", "rerank") else DEFAULT_CONTEXT
    wanted = request.context or min(facts.n_ctx_train, ceiling)
    return min(-(-wanted // CONTEXT_STEP) * CONTEXT_STEP, facts.n_ctx_train)


def _usable(request: LoadRequest, devices: Sequence[FreeDevice]) -> list[FreeDevice]:
    """The devices that the profile leaves, held to its ranks and shares."""
    found = usable_devices(request, devices, mixed="; use gpu_layers for that")
    ranks = request.tensor_parallel or 1
    if request.shares is not None:
        shares = request.shares
        if request.devices is None or len(shares) != len(request.devices):
            raise BadRequest("shares needs devices, one share for each", param="shares")
        if any(not 0 <= share < 1e9 for share in shares) or sum(shares) <= 0:
            raise BadRequest(f"shares = {shares}: each must be 0 or more, one more than 0", param="shares")
    if found[0].kind == "cpu":
        if ranks > 1:
            raise BadRequest(
                f"tensor_parallel = {ranks} needs {ranks} GPUs; this node has none", param="tensor_parallel"
            )
        return found[:1]
    if ranks > len(found):
        message = f"tensor_parallel = {ranks} needs {ranks} GPUs; {len(found)} can be used here"
        raise BadRequest(message, param="tensor_parallel")
    return found


def _place(
    request: LoadRequest, facts: ModelFacts, load: Load, usable: list[FreeDevice], gpu_layers: int
) -> tuple[Load, Placement]:
    """1. As few devices as hold the wanted context. 2. Else, where no context was asked for, all of them and the
    largest context that they hold. 3. Else all of them, and it does not fit."""
    choices = _choices(request, usable, gpu_layers)
    load = _with_batch(load, facts, request)
    for placement in choices:
        if _fits(load, placement):
            return load, placement
    last = choices[-1]
    if request.context is None:
        floor = min(FLOOR_CONTEXT, load.context)
        for context in range(load.context - load.context % CONTEXT_STEP, floor - 1, -CONTEXT_STEP):
            smaller = _with_batch(replace(load, context=context), facts, request)
            if _fits(smaller, last):
                return smaller, last
        load = _with_batch(replace(load, context=floor), facts, request)
    return load, last


def _with_batch(load: Load, facts: ModelFacts, request: LoadRequest) -> Load:
    """An input that is pooled must go through in one batch; the context is then what one batch holds."""
    if facts.task not in ("embed", "rerank"):
        return load
    batch = max(request.batch or load.context, MIN_BATCH)
    context = min(load.context, batch) if request.batch else load.context
    return replace(load, batch=batch, ubatch=batch, context=context)


def _choices(request: LoadRequest, usable: list[FreeDevice], gpu_layers: int) -> list[Placement]:
    if usable[0].kind == "cpu":
        return [Placement((usable[0],), 0, (1.0,))]
    if request.devices is not None:
        shares = request.shares or [float(max(d.free_mb, 1)) for d in usable]
        return [Placement(tuple(usable), gpu_layers, tuple(shares))]
    big = [d for d in usable if d.total_mb >= (request.min_device_vram_mb or 0)]
    ranked = sorted(big or usable, key=lambda d: -d.free_mb)
    ranks = request.tensor_parallel or 1
    least = min(max(request.min_devices or 1, ranks), len(ranked))
    most = ranks if ranks > 1 else len(ranked)
    found = []
    for count in range(least, most + 1):
        chosen = sorted(ranked[:count], key=lambda d: d.index)
        shares = [1.0 if ranks > 1 else float(max(d.free_mb, 1)) for d in chosen]
        found.append(Placement(tuple(chosen), gpu_layers, tuple(shares)))
    return found


def _needs(load: Load, placement: Placement) -> list[Need]:
    if placement.devices[0].kind == "cpu":
        return [need_on_cpu(load)]
    return need_on_gpus(load, placement.gpu_layers, list(placement.shares))


def _fits(load: Load, placement: Placement) -> bool:
    needs = _needs(load, placement)
    return all(n.total_mb <= d.free_mb for n, d in zip(needs, placement.devices, strict=True))


def _why(
    request: LoadRequest, files: ModelFiles, load: Load, placement: Placement, needs: list[Need], ways: list[str]
) -> str | None:
    if request.min_devices and placement.devices[0].kind != "cpu" and len(placement.devices) < request.min_devices:
        return f"{files.model_id} asks for {request.min_devices} devices; {len(placement.devices)} can be used here"
    small = [d for d in placement.devices if d.total_mb < (request.min_device_vram_mb or 0)]
    if small and placement.devices[0].kind != "cpu":
        asked = request.min_device_vram_mb
        return (
            f"{files.model_id} asks for {asked} MB on each device; device {small[0].index} has {small[0].total_mb} MB"
        )
    short = [
        f"{need.total_mb} MB on device {device.index} ({device.name}), where {device.free_mb} MB are free: "
        f"weights {in_mb(need.weights)}, KV cache {in_mb(need.kv)}, overhead {in_mb(need.overhead)}"
        for device, need in zip(placement.devices, needs, strict=True)
        if need.total_mb > device.free_mb
    ]
    if not short:
        return None
    unit = "tokens shared" if load.kv_unified else "tokens each"
    head = f"{files.model_id} with {load.slots} slots of {load.context} {unit} needs " + "; and ".join(short)
    out = f"It would fit with {' or '.join(ways)}" if ways else "Use a smaller quantisation, or another node"
    return f"{head}. {out}."


def _ways_out(load: Load, placement: Placement) -> list[str]:
    """What would fit, tried rather than guessed; nothing where it fits as it is."""
    if _fits(load, placement):
        return []
    ways = []
    for context in (load.context // 2, load.context // 4, load.context // 8, 2048, 512):
        if 256 <= context < load.context and _fits(replace(load, context=context), placement):
            ways.append(f"context = {context}")
            break
    if load.slots > 1 and _fits(replace(load, slots=1), placement):
        ways.append("slots = 1")
    if load.kv_type == "f16" and load.flash_attention is not False and _fits(replace(load, kv_type="q8_0"), placement):
        ways.append('kv_cache = "q8_0"')
    if placement.devices[0].kind != "cpu":
        layers = next((n for n in range(placement.gpu_layers - 1, 0, -1) if _fits_with(load, placement, n)), 0)
        if layers:
            ways.append(f"gpu_layers = {layers} (the rest on the CPU)")
    return ways


def _fits_with(load: Load, placement: Placement, gpu_layers: int) -> bool:
    return _fits(load, replace(placement, gpu_layers=gpu_layers))
