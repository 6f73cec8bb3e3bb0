"""One model's life on this node: loading, serving, recovering, unloading.

The states and what may follow which are lifecycle.NEXT; `become` is the only way from one to the next, checks it and
tells everybody at once. One gate per model is held for the whole of a load, a recovery or an unload, so that however
many ask there is one of them, and models never wait for each other. Work runs in tasks of its own: a caller that
leaves ends nothing. All calls come from the daemon's loop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from helexa.core import logs
from helexa.core.errors import Conflict, HelexaError, LoadFailed, ModelLoading, ModelUnloading, Transient
from helexa.core.lifecycle import (
    NEXT,
    DeviceMemory,
    LoadRequest,
    ModelInfo,
    ModelLimits,
    ModelStatus,
    Progress,
)
from helexa.core.relay.upstream import Upstream
from helexa.neuron.admission import Seats
from helexa.neuron.devices import Devices
from helexa.neuron.harness import reference
from helexa.neuron.hosts import QUIT_S, Host, HostFailed, Hosts
from helexa.neuron.planner import Placed, Planner

if TYPE_CHECKING:
    from helexa.neuron.store import Store

_log = logs.get("neuron.models")

GIVE_UP: Final = 5  # deaths, or loads that failed, in a row
STABLE_S: Final = 60.0  # a host that lived so long starts a new row
ETA_FROM: Final = 0.1  # of a load: before that its pace says nothing

Status = ModelStatus
BUSY: Final = frozenset({Status.DOWNLOADING, Status.LOADING, Status.RECOVERING})


@dataclass(slots=True)
class Counts:
    """For the metrics, by model id."""

    loads: dict[str, int] = field(default_factory=dict)
    load_failures: dict[str, int] = field(default_factory=dict)
    host_deaths: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def add(counter: dict[str, int], model_id: str) -> None:
        counter[model_id] = counter.get(model_id, 0) + 1


@dataclass(frozen=True, slots=True)
class House:
    """What a model needs of the daemon."""

    node: str
    store: Store
    planner: Planner
    devices: Devices
    hosts: Hosts
    counts: Counts
    changed: Callable[[Resident], None]
    backoff_s: float = 0.5  # before the first recovery; doubles


@dataclass(frozen=True, slots=True)
class Serving:
    """A model that is up: its host and what stands before it."""

    host: Host
    upstream: Upstream
    seats: Seats
    since: float


class Resident:
    """seats is None unless requests may come: the one thing that the hot path looks at."""

    def __init__(self, model_id: str, house: House) -> None:
        self.id = model_id
        self.status = Status.UNLOADED
        self.request = LoadRequest(model_id=model_id)
        self.spec_hash: str | None = None  # of what is loaded or being loaded
        self.failed_download = False
        self.never_loaded = True
        self.seats: Seats | None = None
        self.placed: Placed | None = None  # what is loaded, with the memory it holds
        self.serving: Serving | None = None
        self.error: str | None = None
        self.progress: Progress | None = None
        self.load_seconds: float | None = None
        self.wanted = False
        self._house = house
        self._gate = asyncio.Lock()
        self._load: asyncio.Task[None] | None = None
        self._asked: str | None = None  # spec_hash of the load that runs or waits for the gate
        self._begun: asyncio.Future[None] | None = None  # of that load: it has been accepted
        self._recovery: asyncio.Task[None] | None = None
        self._unload: asyncio.Task[None] | None = None
        self._cut = asyncio.Event()  # ends a drain
        self._stop_reason: Callable[[], HelexaError] = self._was_unloaded
        self._deaths = 0
        self._work_since = 0.0
        self._last_used = 0.0

    # what the daemon asks

    async def load(self, request: LoadRequest, *, wait: bool) -> ModelStatus:
        """LOADED, or, without `wait`, LOADING once the load is certain to be tried. Raises why it cannot be."""
        asked = request.spec_hash()
        if self._load is None or self._load.done():
            if self.status in (Status.LOADED, Status.RECOVERING):
                self._check_same(asked, self.spec_hash)
                self.wanted = True
                if self.status is Status.RECOVERING and not wait:
                    return Status.LOADING
                if self.status is Status.RECOVERING and self._recovery is not None:
                    await self._outcome(self._recovery)
                return Status.LOADED
            self._asked = asked
            self._begun = asyncio.get_running_loop().create_future()
            self._load = _owned(self._run_load(request, self._begun), f"load {self.id}")
        else:
            self._check_same(asked, self._asked)
        load, begun = self._load, self._begun
        assert begun is not None
        if not wait:
            await asyncio.wait({load, begun}, return_when=asyncio.FIRST_COMPLETED)
            if not load.done():
                return Status.LOADING
        await self._outcome(load)
        return Status.LOADED

    async def unload(self, *, drain_s: float = 0, force: bool = False) -> None:
        """Returns when the process is gone. Conflict(model_in_use) while requests run, or still run after drain_s."""
        active = self.active
        if self.status is Status.LOADED and active and not force and drain_s <= 0:
            raise self._in_use(active)
        self.wanted = False
        if self.status in (Status.LOADING, Status.RECOVERING):
            self.become(Status.UNLOADING)
        for work in (self._load, self._recovery):
            if work is not None and not work.done():
                work.cancel()
                await asyncio.wait({work})
        if self._unload is None or self._unload.done():
            self._cut.clear()
            self._unload = _owned(self._run_unload(drain_s, force), f"unload {self.id}")
        elif force:
            self._cut.set()
        await self._outcome(self._unload)

    def close_admission(self, refusal: Callable[[], HelexaError]) -> None:
        if self.seats is not None:
            self.seats.close(refusal)

    async def stop(self, reason: Callable[[], HelexaError]) -> None:
        """Gone, whatever state it is in; bounded by what a host may take to end."""
        self._stop_reason = reason
        try:
            await self.unload(force=True)
        except HelexaError as err:
            _log.warning("a model did not end well", model=self.id, error=err.message)

    def refusal(self) -> HelexaError:
        """Why a request cannot be served now, for whoever found `seats` to be None."""
        if self.status is Status.UNLOADING:
            return self._unloading()
        if self.status is Status.FAILED:
            return LoadFailed(f"{self.id} is not served: {self.error}. Load it again when the cause is mended.")
        if self.status in BUSY:
            return self._still_loading()
        return not_loaded(self.id, self._house.node)

    def info(self) -> ModelInfo:
        """From memory."""
        info = ModelInfo(id=self.id, status=str(self.status), error=self.error, progress=self.progress)
        info.load_seconds = self.load_seconds
        info.source = self.request.source
        info.quant = self.request.quant
        if self.status is not Status.UNLOADED:
            info.spec_hash = self.spec_hash
        if self._last_used or self.seats is not None:
            info.last_used = _as_utc(max(self._last_used, self.seats.last_used if self.seats else 0.0))
        if self.seats is not None:
            info.active_requests, info.queued_requests = self.seats.active, self.seats.queued
        if self.placed is not None:
            self._describe(info, self.placed)
        return info

    @property
    def active(self) -> int:
        return 0 if self.serving is None else self.serving.seats.active

    async def measure(self) -> bool:
        """Look at what the host holds now. Whether that changed what is known."""
        placed, serving = self.placed, self.serving
        if placed is None or serving is None:
            return False
        before = placed.claim.measured_mb
        await self._house.devices.measure(placed.claim, serving.host)
        return before != placed.claim.measured_mb

    @property
    def is_idle(self) -> bool:
        """Nothing is loaded and nothing is under way."""
        running = (self._load, self._recovery, self._unload)
        return self.serving is None and all(work is None or work.done() for work in running)

    async def _outcome(self, work: asyncio.Task[None]) -> None:
        """Wait for it without ending it when the caller leaves; raise what it raised."""
        await asyncio.wait({work})
        if work.cancelled():  # before it had begun
            raise self._stop_reason()
        work.result()

    # the states

    def become(self, status: ModelStatus, *, error: str | None = None) -> None:
        assert status in NEXT[self.status], f"{self.id}: {self.status} -> {status}"
        _log.info("model", model=self.id, status=str(status), before=str(self.status), error=error)
        self.status = status
        self.error = error
        self.progress = None
        self._work_since = time.monotonic()
        self.seats = self.serving.seats if status is Status.LOADED and self.serving is not None else None
        self._house.changed(self)

    def fail(self, error: str) -> None:
        """FAILED from wherever it is; a load that was refused before it began counts as one that was tried."""
        if self.status is Status.UNLOADED:
            self.status = Status.LOADING
        self.become(Status.FAILED, error=error)

    # the work

    async def _run_load(self, request: LoadRequest, begun: asyncio.Future[None]) -> None:
        async with self._gate:
            if self.status is Status.LOADED:  # an unload stood before us, and its drain ran out
                self._check_same(request.spec_hash(), self.spec_hash)
                return
            self.request, self.spec_hash, self.wanted = request, request.spec_hash(), True
            try:
                await self._bring_up(request, begun)
            except asyncio.CancelledError:
                self._walk_back()
                raise self._stop_reason() from None
            except HelexaError as err:
                self._load_failed(err)
                raise
            except Exception as err:
                _log.exception("a load failed in a way that nobody foresaw", model=self.id)
                failure = LoadFailed(f"{self.id} could not be loaded: {err!r}")
                self._load_failed(failure)
                raise failure from err

    async def _bring_up(self, request: LoadRequest, begun: asyncio.Future[None]) -> None:
        house = self._house
        self.failed_download = False
        files = await asyncio.to_thread(house.store.find_local, request)
        if files is None:
            self.become(Status.DOWNLOADING)
            begun.set_result(None)
            self.failed_download = True
            files = await house.store.resolve(request, self._on_progress)
            self.failed_download = False
        started = time.monotonic()
        placed = await house.planner.place(request, files)
        with placed.claim:
            self.placed = placed
            self.become(Status.LOADING)
            if not begun.done():
                begun.set_result(None)
            self.serving = await self._start(placed)
            placed.claim.keep()
        self.load_seconds = round(time.monotonic() - started, 3)
        self._deaths = 0
        self.never_loaded = False
        Counts.add(house.counts.loads, self.id)
        self._up()

    async def _start(self, placed: Placed) -> Serving:
        """A host that has the model and answers. Raises LoadFailed with the host's reason; nothing is left then."""
        house, plan, harness = self._house, placed.plan, reference(placed.harness)
        key = secrets.token_urlsafe(24)
        try:
            host = await house.hosts.take(self.id, harness)
        except HostFailed as err:
            raise LoadFailed(f"{self.id} could not be loaded: {err}") from err
        try:
            spec = placed.harness.host_spec(plan, host.socket, key)
            await host.load(harness, spec, plan.files.size_bytes, self._on_fraction)
            await house.devices.measure(placed.claim, host)
        except BaseException as err:
            await host.close(0)
            if isinstance(err, HostFailed):
                raise LoadFailed(f"{self.id} could not be loaded: {err}") from err
            raise
        upstream = Upstream(
            self.id, f"unix:{host.socket}", headers={"authorization": f"Bearer {key}"}, max_idle=plan.slots
        )
        seats = Seats(self.id, plan.slots, placed.harness.session(plan), upstream, host.alive_at)
        serving = Serving(host, upstream, seats, time.monotonic())
        host.died.add_done_callback(lambda died: self._host_died(serving, died.result()))
        return serving

    def _up(self) -> None:
        self.become(Status.LOADED)
        self._house.devices.tell()
        self._house.hosts.prepare_spare()

    def _host_died(self, serving: Serving, reason: str) -> None:
        """Running requests fail by their connections; who waits is told to come back."""
        if self.serving is not serving:
            return
        _log.error("a host died", model=self.id, reason=reason, active=serving.seats.active)
        Counts.add(self._house.counts.host_deaths, self.id)
        self._last_used = max(self._last_used, serving.seats.last_used)
        if self.status is not Status.LOADED:
            return  # it drains: the unload goes on, and finds nobody there
        self.serving = None
        if time.monotonic() - serving.since >= STABLE_S:
            self._deaths = 0
        self.become(Status.RECOVERING, error=reason)
        serving.seats.close(self._still_loading)
        serving.upstream.close()
        self._recovery = _owned(self._recover(reason, serving), f"recover {self.id}")

    async def _recover(self, reason: str, dead: Serving) -> None:
        """Load it again, later each time; give up after GIVE_UP failures in a row. Its memory stays reserved."""
        placed = self.placed
        assert placed is not None
        async with self._gate:
            try:
                await dead.host.close(0)
                placed.claim.measure({}, {})
                while True:
                    self._deaths += 1
                    if self._deaths > GIVE_UP:
                        raise LoadFailed(f"{self.id} died {GIVE_UP + 1} times in a row and is given up: {reason}")
                    await asyncio.sleep(self._house.backoff_s * 2 ** (self._deaths - 1))
                    started = time.monotonic()
                    try:
                        self.serving = await self._start(placed)
                        break
                    except LoadFailed as err:
                        reason = err.message
                        _log.warning("a recovery failed", model=self.id, tries=self._deaths, reason=reason)
            except asyncio.CancelledError:
                self._walk_back()
                raise self._stop_reason() from None
            except Exception as err:
                failure = err if isinstance(err, HelexaError) else LoadFailed(f"{self.id} did not recover: {err!r}")
                self._load_failed(failure)
                raise failure from err
            self.load_seconds = round(time.monotonic() - started, 3)
            self._up()

    async def _run_unload(self, drain_s: float, force: bool) -> None:
        async with self._gate:
            if self.status is Status.FAILED:
                self.become(Status.UNLOADED)
            if self.status is not Status.LOADED or self.serving is None:
                return
            serving = self.serving
            self.become(Status.UNLOADING)
            serving.seats.close(self._unloading)
            if serving.seats.active and not force:
                await self._drain(serving, drain_s)
            active = serving.seats.active
            if active and not (force or self._cut.is_set() or serving.host.died.done()):
                self.wanted = True
                serving.seats.reopen()
                self.become(Status.LOADED)
                raise self._in_use(active)
            await self._end(serving, 0 if active else QUIT_S)
            self.become(Status.UNLOADED)
            self._house.devices.tell()

    async def _drain(self, serving: Serving, drain_s: float) -> None:
        """Until nobody is left, drain_s is over, the host died, or someone forces it."""
        ends: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(serving.seats.idle()),
            asyncio.ensure_future(self._cut.wait()),
        ]
        try:
            await asyncio.wait([*ends, serving.host.died], timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()

    async def _end(self, serving: Serving, within_s: float) -> None:
        """The process is gone, its memory is back."""
        self._last_used = max(self._last_used, serving.seats.last_used)
        self.serving = None
        serving.upstream.close()
        await serving.host.close(within_s)
        self._let_go()
        await self._house.devices.refresh()

    def _let_go(self) -> None:
        if self.placed is not None:
            self.placed.claim.release()
            self.placed = None

    def _walk_back(self) -> None:
        """A load or a recovery was cancelled; its host is gone already."""
        self._let_go()
        if self.status in (Status.LOADING, Status.RECOVERING):
            self.become(Status.UNLOADING)
        if self.status is not Status.UNLOADED:
            self.become(Status.UNLOADED)

    def _load_failed(self, err: HelexaError) -> None:
        """A load that had begun has failed; one that was only asked for leaves the model as it was, with the reason."""
        self._let_go()
        Counts.add(self._house.counts.load_failures, self.id)
        self._house.hosts.prepare_spare()
        if self.status in BUSY:
            self.wanted = False
            self.become(Status.FAILED, error=err.message)
        elif self.status is Status.UNLOADING:  # an unload came while it failed by itself
            self.become(Status.UNLOADED)
        else:
            self.error = err.message
            self._house.changed(self)

    def _on_progress(self, progress: Progress) -> None:
        self.progress = progress
        self._house.changed(self)

    def _on_fraction(self, fraction: float | None) -> None:
        if self.status not in (Status.LOADING, Status.RECOVERING):
            return
        eta = None
        if fraction is not None and fraction >= ETA_FROM:
            eta = round((time.monotonic() - self._work_since) * (1 - fraction) / fraction, 1)
        now = Progress(phase="loading", fraction=None if fraction is None else round(fraction, 3), eta_seconds=eta)
        if self.progress is None or self.progress.fraction != now.fraction:
            self._on_progress(now)

    # words

    def _check_same(self, asked: str, has: str | None) -> None:
        if asked != has:
            raise Conflict(
                f"{self.id} is {self.status} with another profile than this request asks for. Unload it first, or ask "
                "for the profile it has.",
                code="loaded_differently",
                details={"spec_hash": has, "asked": asked},
            )

    def _in_use(self, active: int) -> HelexaError:
        return Conflict(
            f"{self.id} serves {active} requests. Give it time with drain_s, or cut them with force.",
            code="model_in_use",
            details={"active_requests": active},
        )

    def _still_loading(self) -> Transient:
        loading: dict[str, Any] = {"state": str(self.status), "node": self._house.node}
        if self.progress is not None:
            loading |= {"progress": self.progress.fraction, "eta_seconds": self.progress.eta_seconds}
        told = {name: value for name, value in loading.items() if value is not None}
        return ModelLoading(
            f"{self.id} is {self.status} on {self._house.node}; try again in a moment.", details={"loading": told}
        )

    def _unloading(self) -> HelexaError:
        return ModelUnloading(f"{self.id} is being unloaded on {self._house.node}; ask another node, or again later.")

    def _was_unloaded(self) -> HelexaError:
        return ModelUnloading(f"{self.id} was unloaded on {self._house.node} while it was loading.")

    def _describe(self, info: ModelInfo, placed: Placed) -> None:
        plan, claim = placed.plan, placed.claim
        facts = plan.facts
        info.harness = self._house.planner.name_of(placed.harness)
        info.devices = list(plan.device_indices)
        known = claim.measured_mb or claim.need_mb
        info.memory = [DeviceMemory(device=device, used_mb=mb) for device, mb in sorted(known.items())]
        info.vram_used_mb = sum(known.values())
        info.limits = ModelLimits(context=plan.context, slots=plan.slots)
        info.task = self.request.task or facts.task
        info.capabilities = list(self.request.capabilities or facts.capabilities)
        info.size_bytes, info.n_ctx_train, info.n_params = facts.size_bytes, facts.n_ctx_train, facts.n_params
        info.quant = facts.quant or self.request.quant


def not_loaded(model_id: str, node: str) -> HelexaError:
    """Not a 404: a gateway that comes too late tries elsewhere, and a person is told what to do."""
    return ModelLoading(
        f"{model_id} is on the disk of {node} but not loaded. Load it with POST /models/load, or ask the gateway, "
        "which loads by itself.",
        details={"loading": {"state": str(Status.UNLOADED), "node": node}},
    )


def _owned(work: Any, name: str) -> asyncio.Task[None]:
    """A task whose outcome is looked at even when nobody waits for it any more."""
    task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def _as_utc(monotonic: float) -> str | None:
    if not monotonic:
        return None
    moment = datetime.now(UTC) - timedelta(seconds=time.monotonic() - monotonic)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
