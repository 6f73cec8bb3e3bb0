"""From a model's files to a plan with memory reserved for it, or to a refusal that says what is in the way."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from helexa.core.errors import BadRequest, Conflict, HelexaError, NeverLoads
from helexa.core.lifecycle import Estimate, LoadRequest
from helexa.neuron.devices import Devices
from helexa.neuron.harness.base import Harness, ModelFacts, ModelFiles, Plan
from helexa.neuron.memory import Claim, DoesNotFit

CHOOSE: Final = frozenset({None, "", "auto", "candle"})  # "candle" stands in existing files


@dataclass(frozen=True, slots=True)
class Placed:
    """A plan, and the memory that is reserved for it: enter the claim before anything else is awaited."""

    harness: Harness
    plan: Plan
    claim: Claim


class Planner:
    def __init__(self, harnesses: Mapping[str, Harness], devices: Devices) -> None:
        self._harnesses = harnesses
        self._devices = devices
        self._turn = asyncio.Lock()  # between a look at what is free and its reservation nobody else reserves

    async def place(self, request: LoadRequest, files: ModelFiles) -> Placed:
        """Raises NeverLoads, BadRequest, Conflict(insufficient_memory)."""
        harness, facts = await asyncio.to_thread(self._inspect, request, files)
        async with self._turn:
            await self._devices.refresh()
            plan = await asyncio.to_thread(harness.plan, request, files, facts, self._devices.free())
            if plan.estimate.fits:
                try:
                    return Placed(harness, plan, self._devices.reserve(files.model_id, need_mb(plan.estimate)))
                except DoesNotFit:
                    pass  # the harness planned for more than it was offered
        raise await asyncio.to_thread(self._refusal, harness, plan, facts)

    async def estimate(self, request: LoadRequest, files: ModelFiles, *, without: Claim | None) -> Estimate:
        """without: what the model holds now, if it is loaded."""
        harness, facts = await asyncio.to_thread(self._inspect, request, files)
        await self._devices.refresh()
        plan = await asyncio.to_thread(harness.plan, request, files, facts, self._devices.free(without=without))
        if plan.estimate.fits:
            return plan.estimate
        alone = (await asyncio.to_thread(harness.plan, request, files, facts, self._devices.empty())).estimate
        return plan.estimate if alone.fits else msgspec.structs.replace(alone, never=True)

    async def alone(self, request: LoadRequest, files: ModelFiles) -> tuple[Harness, Plan]:
        """As if nothing were loaded; whether it fits is not asked."""
        harness, facts = await asyncio.to_thread(self._inspect, request, files)
        devices = self._devices.empty() or self._devices.free()
        return harness, await asyncio.to_thread(harness.plan, request, files, facts, devices)

    def name_of(self, harness: Harness) -> str:
        return next(name for name, known in self._harnesses.items() if known is harness)

    def _inspect(self, request: LoadRequest, files: ModelFiles) -> tuple[Harness, ModelFacts]:
        harness = self._choose(request, files)
        return harness, harness.inspect(files, request)

    def _choose(self, request: LoadRequest, files: ModelFiles) -> Harness:
        if request.harness in CHOOSE:
            able = [harness for harness in self._harnesses.values() if harness.can_serve(files)]
            if not able:
                raise NeverLoads(
                    f"{files.model_id}: no harness of this node can serve {files.files[0]}; "
                    f"there is {', '.join(self._harnesses)}."
                )
            whys = [harness.why_not() for harness in able]
            for harness, why in zip(able, whys, strict=True):
                if why is None:
                    return harness
            raise NeverLoads(f"{files.model_id} cannot be served here: {whys[0]}")
        chosen = self._harnesses.get(request.harness or "")
        if chosen is None:
            raise BadRequest(
                f'harness "{request.harness}" is not known on this node; use one of {", ".join(self._harnesses)}, '
                "or leave it out.",
                param="harness",
            )
        if why := chosen.why_not():
            raise NeverLoads(f"{files.model_id} cannot be served here: {why}")
        return chosen

    def _refusal(self, harness: Harness, plan: Plan, facts: ModelFacts) -> HelexaError:
        """One that never ends (422), or one that an unload could end (409)."""
        request, files = plan.request, plan.files
        alone = harness.plan(request, files, facts, self._devices.empty()).estimate
        if not alone.fits:
            return NeverLoads(
                f"{files.model_id} can never fit on this node, with nothing else loaded either: {_why(alone)}",
                details=_shortage(alone),
            )
        return Conflict(
            f"{files.model_id} does not fit now: {_why(plan.estimate)} Or unload a model.",
            code="insufficient_memory",
            details=_shortage(plan.estimate),
        )


def need_mb(estimate: Estimate) -> dict[int, int]:
    return {device.index: device.need_mb for device in estimate.devices}


def _why(estimate: Estimate) -> str:
    """The harness's own words, as sentences, or the figures."""
    figures = _shortage(estimate)
    why = estimate.why or f"it needs {figures['need_mb']} MB, where {figures['free_mb']} MB are free"
    return why if why.endswith(".") else f"{why}."


def _shortage(estimate: Estimate) -> dict[str, Any]:
    devices = [
        {"index": device.index, "need_mb": device.need_mb, "free_mb": device.free_mb} for device in estimate.devices
    ]
    return {
        "need_mb": estimate.need_mb,
        "free_mb": sum(device.free_mb or 0 for device in estimate.devices),
        "devices": devices,
    }
