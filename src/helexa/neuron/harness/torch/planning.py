"""From a profile, a model's facts and the free memory to a Plan: which ranks on which devices, and how many tokens'
keys and values they keep. Pure but for what profile.py asks the machine.

Requests share what is kept: where memory is short, less than slots x context is (the engine then makes the last ones
wait, or compute again), but never less than one whole context. Never raises for what does not fit: `estimate.why` says
so, with the figures and the ways out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from helexa.core.errors import BadRequest
from helexa.core.lifecycle import DeviceEstimate, Estimate, LoadRequest, RankEstimate
from helexa.neuron.harness.base import FreeDevice, ModelFacts, ModelFiles, Plan
from helexa.neuron.harness.profiles import usable_devices
from helexa.neuron.harness.torch.blocks import BLOCK
from helexa.neuron.harness.torch.config import ModelConfig
from helexa.neuron.harness.torch.facts import folder_of
from helexa.neuron.harness.torch.memory import MB, Need, in_mb, need_of
from helexa.neuron.harness.torch.profile import DEFAULT_CONTEXT, DEFAULT_EMBED_CONTEXT, MAX_RANKS, Options, choose
from helexa.neuron.tp.partition import Impossible, Share, partition, possible_world_sizes

CONTEXT_STEP: Final = BLOCK  # keys and values are counted in these
FLOOR_CONTEXT: Final = 2048  # a context that nobody asked for is not cut below this to make it fit


@dataclass(frozen=True, slots=True)
class Layout:
    """A device and a share for each rank. weights: what the shares were dealt by; None: equal."""

    devices: tuple[FreeDevice, ...]
    weights: tuple[float, ...] | None
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """A layout with a context, and the tokens that are kept over all requests."""

    layout: Layout
    needs: tuple[Need, ...]
    context: int
    kv_tokens: int


def plan(request: LoadRequest, files: ModelFiles, facts: ModelFacts, devices: Sequence[FreeDevice]) -> Plan:
    usable = usable_devices(request, devices)
    on_gpu = usable[0].kind != "cpu"
    options = choose(request, facts, on_gpu=on_gpu)
    config: ModelConfig = facts.extra["config"]
    layouts = _layouts(request, config, options, usable, files)
    fit = _place(request, facts, options, layouts)
    why, ways = _why(request, facts, options, fit)
    return Plan(
        request=request,
        files=files,
        facts=facts,
        estimate=Estimate(
            devices=_by_device(fit),
            ranks=_by_rank(fit) if len(fit.needs) > 1 else [],
            why=None if why is None else f"{files.model_id} {why}",
            ways=ways,
            context=fit.context,
            slots=options.slots,
        ),
        context=fit.context,
        slots=options.slots,
        device_indices=tuple(sorted({device.index for device in fit.layout.devices})),
        extra={
            "folder": str(folder_of(files)),
            "task": facts.task,
            "pooling": facts.extra["pooling"],
            "context": fit.context,
            "slots": options.slots,
            "rows": options.rows,
            "chunk": options.chunk,
            "kv_tokens": fit.kv_tokens,
            "dtype": options.dtype,
            "threads": options.threads,
            "devices": ["cpu" if d.kind == "cpu" else f"{d.kind}:{d.index}" for d in fit.layout.devices],
            "device_indices": [device.index for device in fit.layout.devices],
            "weights": None if fit.layout.weights is None else list(fit.layout.weights),
            "chat_template": request.chat_template,
            "merge_system": request.merge_system,
        },
    )


def _layouts(
    request: LoadRequest, config: ModelConfig, options: Options, usable: list[FreeDevice], files: ModelFiles
) -> list[Layout]:
    """What may be tried, the fewest ranks first; for each number of ranks equal shares before unequal ones.

    Raises BadRequest for what no memory could mend.
    """
    ranks, on_cpu = options.world_size, usable[0].kind == "cpu"
    _check_ranks(request, usable, ranks)
    if on_cpu:
        chosen = [tuple(usable * (ranks or 1))]
    elif request.devices is not None:
        chosen = [tuple(usable)]
    else:
        big = [d for d in usable if d.total_mb >= (request.min_device_vram_mb or 0)]
        roomy = sorted(big or usable, key=lambda device: -device.free_mb)
        least = min(ranks or max(request.min_devices or 1, 1), len(roomy))
        counts = [ranks] if ranks else range(least, min(len(roomy), MAX_RANKS) + 1)
        chosen = [tuple(sorted(roomy[:count], key=lambda device: device.index)) for count in counts]
    layouts: list[Layout] = []
    refusal: Impossible | None = None
    for devices in chosen:
        free = tuple(float(max(device.free_mb, 1)) for device in devices)
        given = None if request.shares is None else tuple(request.shares)
        for weights in [given] if given is not None else [None] if on_cpu or len(set(free)) == 1 else [None, free]:
            try:
                shares = partition(config.shape, len(devices), weights)
            except Impossible as err:
                refusal = err
                continue
            layouts.append(Layout(devices, weights, shares))
    if not layouts:
        sizes = possible_world_sizes(config.shape, MAX_RANKS)
        raise BadRequest(
            f"{files.model_id} cannot be split so: {refusal}. World sizes that work: {sizes[0]} to {sizes[-1]}.",
            param="shares" if request.shares is not None else "tensor_parallel",
        )
    return layouts


def _check_ranks(request: LoadRequest, usable: list[FreeDevice], ranks: int | None) -> None:
    on_cpu = usable[0].kind == "cpu"
    if ranks is not None and not on_cpu:
        if request.devices is not None and ranks != len(usable):
            message = f"tensor_parallel = {ranks} needs one device for each rank; devices names {len(usable)}"
            raise BadRequest(message, param="tensor_parallel")
        if ranks > len(usable):
            message = f"tensor_parallel = {ranks} needs {ranks} GPUs; {len(usable)} can be used here"
            raise BadRequest(message, param="tensor_parallel")
    if request.shares is not None:
        if len(request.shares) != (ranks or 1):
            message = f"shares has {len(request.shares)} values for {ranks or 1} ranks; it must be one for each"
            raise BadRequest(message, param="shares")
        if any(share <= 0 for share in request.shares):
            raise BadRequest(f"shares = {request.shares}: each must be over 0", param="shares")


def _place(request: LoadRequest, facts: ModelFacts, options: Options, layouts: list[Layout]) -> Fit:
    """1. The first layout that keeps all that slots and context can want. 2. Else, of all, the one that keeps most, if
    it is a whole context. 3. Else, where no context was asked for, the largest that this one holds. 4. Else it does
    not fit."""
    ceiling = DEFAULT_EMBED_CONTEXT if facts.task == "embed" else DEFAULT_CONTEXT
    context = request.context or min(facts.n_ctx_train, ceiling)
    fits = [_fit(layout, facts, options, context) for layout in layouts]
    for fit in fits:  # 1
        if _room(fit) >= fit.kv_tokens:
            return fit
    least = -(-context // CONTEXT_STEP) * CONTEXT_STEP
    best = max(fits, key=_room)
    room = _room(best) // CONTEXT_STEP * CONTEXT_STEP
    if room >= least:  # 2
        return Fit(best.layout, best.needs, context, room)
    if request.context is None and room >= min(FLOOR_CONTEXT, context):  # 3
        return Fit(best.layout, best.needs, room, room)
    if request.context is None:
        context = min(FLOOR_CONTEXT, context)
    return Fit(best.layout, best.needs, context, -(-context // CONTEXT_STEP) * CONTEXT_STEP)  # 4


def _fit(layout: Layout, facts: ModelFacts, options: Options, context: int) -> Fit:
    config: ModelConfig = facts.extra["config"]
    needs = tuple(
        need_of(
            config,
            share,
            dtype=options.dtype,
            chunk=options.chunk,
            rows=options.rows,
            context=context,
            ranks=len(layout.shares),
            on_gpu=device.kind != "cpu",
        )
        for device, share in zip(layout.devices, layout.shares, strict=True)
    )
    padded = -(-context // CONTEXT_STEP) * CONTEXT_STEP
    wanted = padded if facts.task == "embed" else padded * options.slots
    extra = options.prompt_cache_mb * MB // max(sum(need.kv_per_token for need in needs), 1)
    return Fit(layout, needs, context, wanted + extra)


def _room(fit: Fit) -> int:
    """Tokens that could be kept; negative where not even the weights fit."""
    left: dict[int, int] = {}
    per_token: dict[int, int] = {}
    for device, need in zip(fit.layout.devices, fit.needs, strict=True):
        left.setdefault(device.index, device.free_mb * MB)
        left[device.index] -= in_mb(need.weights) * MB + in_mb(need.overhead) * MB
        per_token[device.index] = per_token.get(device.index, 0) + need.kv_per_token
    return min((left[i] - MB) // max(per_token[i], 1) for i in left)  # MB: rounding up may take one more


def _by_rank(fit: Fit) -> list[RankEstimate]:
    return [
        RankEstimate(
            rank=rank,
            device=device.index,
            weights_mb=in_mb(need.weights),
            kv_mb=in_mb(need.kv(fit.kv_tokens)),
            overhead_mb=in_mb(need.overhead),
        )
        for rank, (device, need) in enumerate(zip(fit.layout.devices, fit.needs, strict=True))
    ]


def _by_device(fit: Fit) -> list[DeviceEstimate]:
    found: dict[int, DeviceEstimate] = {}
    for device, need in zip(fit.layout.devices, fit.needs, strict=True):
        before = found.get(device.index) or DeviceEstimate(
            index=device.index, weights_mb=0, kv_mb=0, overhead_mb=0, free_mb=device.free_mb
        )
        found[device.index] = DeviceEstimate(
            index=device.index,
            weights_mb=before.weights_mb + in_mb(need.weights),
            kv_mb=before.kv_mb + in_mb(need.kv(fit.kv_tokens)),
            overhead_mb=before.overhead_mb + in_mb(need.overhead),
            free_mb=device.free_mb,
        )
    return list(found.values())


def _why(request: LoadRequest, facts: ModelFacts, options: Options, fit: Fit) -> tuple[str | None, list[str]]:
    """Why it does not fit, without the model's name, and what would."""
    on_gpu = fit.layout.devices[0].kind != "cpu"
    if on_gpu and len(fit.needs) < (request.min_devices or 1):
        return f"asks for {request.min_devices} devices; {len(fit.needs)} can be used here", []
    small = [d for d in fit.layout.devices if d.total_mb < (request.min_device_vram_mb or 0)]
    if on_gpu and small:
        asked = request.min_device_vram_mb
        return f"asks for {asked} MB on each device; device {small[0].index} has {small[0].total_mb} MB", []
    names = {device.index: device.name for device in fit.layout.devices}
    short = [
        f"{need.need_mb} MB on device {need.index} ({names[need.index]}), where {need.free_mb} MB are free: "
        f"weights {need.weights_mb}, keys and values {need.kv_mb}, overhead {need.overhead_mb}"
        for need in _by_device(fit)
        if need.need_mb > (need.free_mb or 0)
    ]
    if not short:
        return None, []
    room = _room(fit) // CONTEXT_STEP * CONTEXT_STEP
    ways = []
    if room >= CONTEXT_STEP:
        ways.append(f"context = {room}")
    if options.dtype == "f32":
        half = _fit(fit.layout, facts, replace(options, dtype="bf16"), fit.context)
        if _room(half) >= fit.context:
            ways.append('quant = "bf16"')
    out = f"It would fit with {' or '.join(ways)}" if ways else "Use more or larger devices, or a GGUF of the model"
    ranks = f"on {len(fit.needs)} ranks " if len(fit.needs) > 1 else ""
    return f"with a context of {fit.context} tokens {ranks}needs {' and '.join(short)}. {out}.", ways
