"""What GET /models and the events tell of a model. From memory: a millisecond, also while every device is busy."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

from helexa.core.lifecycle import DeviceMemory, ModelInfo, ModelLimits, ModelStatus
from helexa.neuron.planner import Placed
from helexa.neuron.resident import Resident

if TYPE_CHECKING:
    from helexa.neuron.store import StoredModel


def info_of(resident: Resident, stored: StoredModel | None, harness: str | None) -> ModelInfo:
    """stored: the same model on disk, where it is known there. harness: the name of what serves it."""
    request = resident.request
    info = ModelInfo(
        id=resident.id,
        status=str(resident.status),
        error=resident.error,
        error_code=resident.error_code,
        progress=resident.progress,
        load_seconds=resident.load_seconds,
        last_used=_as_utc(resident.last_used),
        source=request.source,
        quant=request.quant,
    )
    if resident.status is not ModelStatus.UNLOADED:
        info.spec_hash = resident.spec_hash
    if resident.serving is not None:
        info.active_requests = resident.serving.seats.active
        info.queued_requests = resident.serving.seats.queued
    if resident.placed is not None:
        info.harness = harness
        _describe(info, resident.placed)
    if stored is not None:
        info.size_bytes = info.size_bytes or stored.size_bytes
        info.quant = info.quant or stored.quant
        info.source = info.source or stored.source
    return info


def stored_info(stored: StoredModel) -> ModelInfo:
    """Of a model that is only on disk. error: why it cannot be served as it lies there."""
    return ModelInfo(
        id=stored.id,
        status=str(ModelStatus.UNLOADED),
        size_bytes=stored.size_bytes,
        quant=stored.quant,
        source=stored.source,
        error=stored.error,
    )


def _describe(info: ModelInfo, placed: Placed) -> None:
    plan, claim = placed.plan, placed.claim
    request, facts = plan.request, plan.facts
    info.devices = list(plan.device_indices)
    # As the ledger counts it: with /health's figures these tell the gateway what an unload would give back.
    held = {device: claim.held_mb(device) for device in claim.devices}
    info.memory = [DeviceMemory(device=device, used_mb=mb) for device, mb in held.items()]
    info.vram_used_mb = sum(held.values())
    info.limits = ModelLimits(context=plan.context, slots=plan.slots)
    info.task, info.architecture = request.task or facts.task, facts.architecture
    info.capabilities = list(request.capabilities or facts.capabilities)
    info.size_bytes, info.n_ctx_train, info.n_params = facts.size_bytes, facts.n_ctx_train, facts.n_params
    info.quant = facts.quant or request.quant


@lru_cache(maxsize=1024)
def _as_utc(monotonic: float) -> str | None:
    """Of one moment always the same, once it was told: neither the time that passes between two looks at two clocks
    nor a step of the wall clock moves what is over."""
    if not monotonic:
        return None
    moment = datetime.now(UTC) - timedelta(seconds=time.monotonic() - monotonic)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
