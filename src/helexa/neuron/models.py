"""The models of this node: the one table of them, and what may be asked of it.

Everything that is listed is answered from memory; what the disk holds and what the devices say is looked at in the
background. All calls come from the daemon's loop, and none blocks it.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Final

import msgspec

from helexa.core import logs
from helexa.core.config import NeuronSettings
from helexa.core.discovery import DeviceHealth
from helexa.core.errors import (
    BadRequest,
    Conflict,
    HelexaError,
    ModelNotFound,
    NeverLoads,
    Transient,
    UpstreamError,
    nearest,
)
from helexa.core.lifecycle import Estimate, LoadRequest, ModelInfo, ModelStatus, UnloadRequest
from helexa.core.relay.contract import Exchange
from helexa.neuron import refusals
from helexa.neuron.admission import Seat
from helexa.neuron.counters import Counters
from helexa.neuron.devices import Devices
from helexa.neuron.discovery import Probe
from helexa.neuron.freed import give_back_freed
from helexa.neuron.harness import reference
from helexa.neuron.harness.base import Harness
from helexa.neuron.hosts import Hosts
from helexa.neuron.kv.store import Figures, open_store
from helexa.neuron.listing import info_of, stored_info
from helexa.neuron.planner import Planner
from helexa.neuron.resident import BUSY, Counts, House, Resident
from helexa.neuron.run_dir import RunDir

if TYPE_CHECKING:
    from helexa.neuron.store import Store, StoredModel

__all__ = ["Models", "Seat"]

_log = logs.get("neuron.models")

LOOK_S: Final = 1.0  # are the hosts at work?
REFRESH_LOOKS: Final = 2  # every so many looks: the devices' and hosts' memory
DISK_LOOKS: Final = 5  # ... and what is on disk
SWEEP_LOOKS: Final = 60  # ... and how old the saved prompt caches are
RETRY_S: Final = (5.0, 10.0, 20.0, 40.0, 60.0)  # a default model whose download failed: the network may be up later
FORGET_ABOVE: Final = 100  # failed loads of names that are not on disk, kept for their reasons


class Models:
    """counts: loads, failed loads and deaths of hosts, by model."""

    def __init__(
        self,
        settings: NeuronSettings,
        *,
        harnesses: Mapping[str, Harness],
        probe: Probe,
        store: Store,
        publish: Callable[[str, dict[str, Any]], None],
        backoff_s: float = 0.5,
    ) -> None:
        """Raises ConfigError where run_dir or kv_store_dir cannot be used."""
        self.counts = Counts()
        self._settings = settings
        self._harnesses = harnesses
        self._probe = probe
        self._store = store
        self._publish = publish
        self._residents: dict[str, Resident] = {}
        self._on_disk: dict[str, StoredModel] = {}
        self._shutdown = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._defrag: asyncio.Task[dict[str, Any]] | None = None
        self._devices = Devices(
            probe, settings.memory_limit_mb, lambda health: publish("device", msgspec.to_builtins(health))
        )
        self._hosts = Hosts(
            RunDir(settings.run_dir, os.environ), isolation=settings.isolation, spare=settings.spare_host
        )
        self._planner = Planner(harnesses, self._devices)
        self._kv_store = open_store(settings, os.environ)
        self._counters = Counters(self._hosts, self._planner, self._devices)
        self._house = House(
            node=platform.node(),
            store=store,
            planner=self._planner,
            devices=self._devices,
            hosts=self._hosts,
            counters=self._counters,
            counts=self.counts,
            changed=self._changed,
            kv_store=self._kv_store,
            backoff_s=backoff_s,
        )

    async def start(self) -> None:
        """What is on disk and on the devices is known; default models load in the background."""
        await asyncio.gather(self._devices.refresh(), self._scan(), self._sweep())
        usable = await asyncio.to_thread(self._first_usable)
        self._hosts.spare_harness = None if usable is None else reference(usable)
        if not self._settings.default_models:
            self._hosts.prepare_spare()
        self._spawn(self._watch(), "watch")
        for request in self._settings.default_models:
            self._spawn(self._load_default(request), f"default {request.id}")

    def close_admission(self) -> None:
        """The drain begins: nobody is admitted any more, who waits is told so, loads end. Running requests go on."""
        if not self._shutdown:
            self._shutdown = True
            for resident in self._residents.values():
                resident.shut_down(refusals.shutting_down)

    async def stop(self, *, keep: bool = True) -> None:
        """All hosts are gone, and the folder of their sockets. Bounded; what still runs is cut. keep: idle models save
        their prompt caches."""
        self.close_admission()
        tasks = [*self._tasks, *([self._defrag] if self._defrag is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(resident.stop(keep=keep) for resident in self._residents.values()))
        await self._counters.close(refusals.shutting_down)
        await self._hosts.close()

    # listings, from memory

    def listing(self) -> list[ModelInfo]:
        """Loaded or not, what the node could serve. A file that is loaded under another id is not listed twice."""
        in_use = {
            file
            for resident in self._residents.values()
            if resident.placed is not None
            for file in resident.placed.plan.files.files
        }
        infos = [self._info(resident) for resident in self._residents.values()]
        for model_id, stored in self._on_disk.items():
            if model_id not in self._residents and not in_use.intersection(stored.files):
                infos.append(stored_info(stored))
        return infos

    def info(self, model_id: str) -> ModelInfo | None:
        if resident := self._residents.get(model_id):
            return self._info(resident)
        stored = self._on_disk.get(model_id)
        return None if stored is None else stored_info(stored)

    def kv_figures(self) -> Figures | None:
        """None where prompt caches are not kept."""
        return None if self._kv_store is None else self._kv_store.figures

    def device_health(self) -> list[DeviceHealth]:
        return self._devices.health()

    def files_in_use(self) -> set[Any]:
        """Paths that a host has open or is about to open: not to be removed."""
        return {
            path
            for resident in self._residents.values()
            if resident.placed is not None
            for path in _paths_of(resident.placed.plan.files)
        }

    # loading and unloading

    async def estimate(self, request: LoadRequest) -> Estimate:
        """What a load would take, without loading. Only for what is on disk."""
        self._check_named(request)
        files = await asyncio.to_thread(self._store.find_local, request)
        if files is None:
            raise ModelNotFound(
                f"{request.id} is not on this node's disk, so that nothing can be said of its size. "
                "POST /models/load or `neuron pull` fetches it."
            )
        resident = self._residents.get(request.id)
        claim = resident.placed.claim if resident is not None and resident.placed is not None else None
        return await self._planner.estimate(request, files, without=claim)

    async def load(self, request: LoadRequest, *, wait: bool, local_caller: bool) -> ModelStatus:
        """LOADED, or LOADING without `wait`. Leaving does not end the load.

        Raises NeverLoads, BadRequest, PermissionDenied, Conflict (insufficient_memory, loaded_differently),
        LoadFailed, ShuttingDown; ModelUnloading when it was unloaded meanwhile.
        """
        if self._shutdown:
            raise refusals.shutting_down()
        self._check_named(request)
        self._store.check_request_allowed(request, local_caller=local_caller)
        if self._probe.refuse_loads is not None:
            raise NeverLoads(f"This node loads nothing: {self._probe.refuse_loads}", code="device_unusable")
        resident = self._resident(request.id)
        try:
            return await resident.load(request, wait=wait)
        finally:
            self._forget_strangers()

    async def unload(self, request: UnloadRequest) -> None:
        """Its memory is back. Unloading what is not loaded is no error. Conflict(model_in_use)."""
        if not request.id:
            raise BadRequest("`model_id` is missing: name the model to unload.", param="model_id")
        resident = self._residents.get(request.id)
        if resident is not None:
            await resident.unload(drain_s=request.drain_s, force=request.force)
        elif request.id not in self._on_disk:
            raise self._unknown(request.id)

    async def defrag(self) -> dict[str, Any]:
        """Start afresh what lives long: the spare, the hosts of loaded models, which come back by themselves, and freed
        memory of the daemon. Goes on when the caller leaves. Conflict while in use."""
        if self._defrag is None or self._defrag.done():
            self._check_idle()
            self._defrag = asyncio.get_running_loop().create_task(self._recycle(), name="defrag")
        work = self._defrag
        await asyncio.wait({work})
        if work.cancelled():
            raise refusals.shutting_down()
        return work.result()

    def _check_idle(self) -> None:
        active = sum(resident.active for resident in self._residents.values())
        working = [resident.id for resident in self._residents.values() if resident.status in BUSY]
        if active or working:
            raise Conflict(
                f"The devices are in use: {active} requests run"
                + (f" and {', '.join(working)} is loading" if working else "")
                + ". Try again when they have ended.",
                code="in_use",
                details={"active_requests": active},
            )

    async def _recycle(self) -> dict[str, Any]:
        """One model after the other, so that the node serves the rest; what has come into use meanwhile is left."""
        await self._devices.refresh()
        before = msgspec.to_builtins(self._devices.health())
        await self._hosts.renew_spare()
        recycled = []
        for resident in list(self._residents.values()):
            try:
                if await resident.recycle():
                    recycled.append(resident.id)
            except HelexaError as err:
                _log.warning("a model did not come back from defragmenting", model=resident.id, error=err.message)
        await asyncio.to_thread(give_back_freed)
        await self._devices.refresh()
        return {"before": before, "after": msgspec.to_builtins(self._devices.health()), "recycled": recycled}

    # requests

    def admit(self, exchange: Exchange) -> Seat | Awaitable[Seat]:
        """HOT, once per request: two look-ups. A seat at the model, or an awaitable of one while all are taken; to
        cancel that gives everything back. Raises why the model cannot serve now."""
        resident = self._residents.get(exchange.model)
        if resident is not None and resident.seats is not None:
            return resident.seats.enter(exchange)
        raise self._refusal(exchange.model)

    async def count_tokens(self, model: str, body: bytes, profile: LoadRequest | None = None) -> int:
        """Prompt tokens of a chat body. Takes no seat and loads nothing: 1. The engine that has the model answers it
        beside its slots. 2. Else a host that has no more than its tokenizer and template (Counters).

        profile: how the model would be loaded, where that is known; else as it was loaded last, or as it lies on disk.
        """
        resident = self._residents.get(model)
        if resident is not None and resident.seats is not None and (serving := resident.serving) is not None:
            with suppress(ConnectionError):  # unloaded meanwhile, or dead
                return await self._counted(model, serving.seats.session.count_tokens(body, serving.upstream))
        if self._shutdown:
            raise refusals.shutting_down()
        request = profile or (LoadRequest(model_id=model) if resident is None else resident.request)
        files = await asyncio.to_thread(self._store.find_local, request)
        if files is None:
            raise self._refusal(model)
        try:
            return await self._counted(model, self._counters.count(request, files, body))
        except ConnectionError as err:
            raise UpstreamError(f"The host that counts the tokens of {model} died: {err}. Try again.") from err

    async def _counted(self, model: str, work: Awaitable[int]) -> int:
        try:
            return await work
        except TimeoutError as err:
            raise UpstreamError(f"The tokens of {model} were not counted in time. Try again.") from err

    def _refusal(self, model: str) -> HelexaError:
        if self._shutdown:
            return refusals.shutting_down()
        resident = self._residents.get(model)
        if resident is None:
            if model not in self._on_disk:
                return self._unknown(model)
            error = self._on_disk[model].error
            return refusals.failed(model, error) if error else refusals.not_loaded(model, self._house.node)
        return resident.refusal()

    def _unknown(self, model: str) -> HelexaError:
        near = nearest(model, [info.id for info in self.listing()])
        hint = f" Did you mean {' or '.join(near)}?" if near else " GET /models lists what there is."
        return ModelNotFound(f"The model `{model}` is not known on {self._house.node}.{hint}", param="model")

    # ours

    def _resident(self, model_id: str) -> Resident:
        resident = self._residents.get(model_id)
        if resident is None:
            resident = self._residents[model_id] = Resident(model_id, self._house)
        return resident

    def _forget_strangers(self) -> None:
        """Names that never came to anything do not stay in the table for ever."""
        idle = [r for r in self._residents.values() if r.is_idle and r.id not in self._on_disk]
        failed = [r for r in idle if r.status is ModelStatus.FAILED]
        for resident in [r for r in idle if r.status is ModelStatus.UNLOADED and r.never_loaded]:
            del self._residents[resident.id]
        for resident in failed[: max(0, len(failed) - FORGET_ABOVE)]:
            del self._residents[resident.id]

    def _info(self, resident: Resident) -> ModelInfo:
        harness = None if resident.placed is None else self._planner.name_of(resident.placed.harness)
        return info_of(resident, self._on_disk.get(resident.id), harness)

    def _changed(self, resident: Resident) -> None:
        self._publish("model", msgspec.to_builtins(self._info(resident)))

    def _check_named(self, request: LoadRequest) -> None:
        if not request.id:
            raise BadRequest("`model_id` is missing: name the model to load.", param="model_id")

    async def _load_default(self, request: LoadRequest) -> None:
        """Until it is loaded, or has failed for good. What the network may mend is tried again."""
        for delay in chain(RETRY_S, repeat(RETRY_S[-1])):
            try:
                await self.load(request, wait=True, local_caller=True)
                return
            except HelexaError as err:
                resident = self._resident(request.id)
                if resident.status is ModelStatus.UNLOADED:
                    resident.fail(err.message)
                _log.error("a default model is not loaded", model=request.id, error=err.message)
                if not isinstance(err, Transient) or not resident.failed_download:
                    return
            await asyncio.sleep(delay)

    async def _watch(self) -> None:
        looks = 0
        while True:
            await asyncio.sleep(LOOK_S)
            looks += 1
            try:
                await self._look(looks)
            except Exception:
                _log.exception("a look at hosts and devices failed")

    async def _look(self, looks: int) -> None:
        residents = list(self._residents.values())
        for resident in residents:
            if resident.serving is not None:
                resident.serving.host.look()
                resident.save_ahead()
        self._counters.look()
        if looks % REFRESH_LOOKS == 0:
            await self._devices.refresh()
            for resident in residents:
                if not self._devices.is_stuck and await resident.measure():
                    self._changed(resident)
        if looks % DISK_LOOKS == 0:
            await self._scan()
        if looks % SWEEP_LOOKS == 0:
            await self._sweep()

    async def _sweep(self) -> None:
        if self._kv_store is not None:
            try:
                await asyncio.to_thread(self._kv_store.sweep)
            except OSError as err:
                self._kv_store.failed(str(err))

    async def _scan(self) -> None:
        """What is on disk; tells of what is new there, and of what is gone."""
        found = {stored.id: stored for stored in await asyncio.to_thread(self._store.on_disk)}
        before, self._on_disk = self._on_disk, found
        for model_id in found.keys() - before.keys() - self._residents.keys():
            self._publish("model", msgspec.to_builtins(stored_info(found[model_id])))

    def _first_usable(self) -> Harness | None:
        return next((harness for harness in self._harnesses.values() if harness.why_not() is None), None)

    def _spawn(self, work: Any, name: str) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _paths_of(files: Any) -> list[Any]:
    return [path for path in (*files.files, files.projector, files.draft, *files.lora) if path is not None]
