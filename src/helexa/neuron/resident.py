"""One model's life on this node: loading, serving, recovering, unloading.

The states and what may follow which are lifecycle.NEXT; `become` is the only way from one to the next, checks it and
tells everybody at once. One gate per model is held for the whole of a load, a recovery or an unload, so that however
many ask there is one of them, and models never wait for each other. Work runs in tasks of its own: a caller that
leaves ends nothing. All calls come from the daemon's loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from helexa.core import logs
from helexa.core.errors import HelexaError, LoadFailed
from helexa.core.lifecycle import (
    NEXT,
    LoadRequest,
    ModelStatus,
    Progress,
)
from helexa.neuron import refusals
from helexa.neuron.admission import Seats
from helexa.neuron.counters import Counters
from helexa.neuron.devices import Devices
from helexa.neuron.harness.base import ModelFiles
from helexa.neuron.hosts import QUIT_S, Hosts
from helexa.neuron.planner import Placed, Planner
from helexa.neuron.serving import Serving, end_host, start
from helexa.neuron.tasks import cancel_soon, owned, surely

if TYPE_CHECKING:
    from helexa.neuron.kv.store import KvStore
    from helexa.neuron.store import Store

_log = logs.get("neuron.models")

GIVE_UP: Final = 5  # deaths, or loads that failed, in a row
STABLE_S: Final = 60.0  # a host that lived so long starts a new row
WORTH_TELLING: Final = 0.02  # of a model's memory
PREFLIGHT_S: Final = 2.0  # what the Hub gets to refuse before a download counts as begun
SAVE_S: Final = 5.0  # what an unload waits at most for its prompt cache to be written
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
    counters: Counters
    counts: Counts
    changed: Callable[[Resident], None]
    kv_store: KvStore | None = None  # None: prompt caches are not kept
    backoff_s: float = 0.5  # before the first recovery; doubles


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
        self.error_code: str | None = None
        self.progress: Progress | None = None
        self.load_seconds: float | None = None
        self._house = house
        self._gate = asyncio.Lock()
        self._load: asyncio.Task[None] | None = None
        self._asked: str | None = None  # spec_hash of the load that runs or waits for the gate
        self._begun: asyncio.Future[None] | None = None  # of that load: it has been accepted
        self._recovery: asyncio.Task[None] | None = None
        self._unload: asyncio.Task[None] | None = None
        self._cut = asyncio.Event()  # ends a drain
        self._stop_reason: Callable[[], HelexaError] = self._was_unloaded
        self._closed = False  # the daemon is shutting down
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
                if self.status is Status.RECOVERING and not wait:
                    return Status.LOADING
                if self.status is Status.RECOVERING and self._recovery is not None:
                    await self._outcome(self._recovery)
                return Status.LOADED
            behind = self._gate.locked()  # an unload that runs; it may drain for long
            self._asked = asked
            self._begun = asyncio.get_running_loop().create_future()
            self._load = owned(self._run_load(request, self._begun), f"load {self.id}")
            if behind and not wait:
                return Status.LOADING
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

    async def unload(self, *, drain_s: float = 0, force: bool = False, keep: bool | None = None) -> None:
        """Returns when the process is gone. Conflict(model_in_use) while requests run, or still run after drain_s.
        keep: save its prompt cache if it is idle; left out: unless it is forced."""
        active = self.active
        if self.status is Status.LOADED and active and not force and drain_s <= 0:
            raise refusals.in_use(self.id, active)
        if self.status in (Status.LOADING, Status.RECOVERING):
            self.become(Status.UNLOADING)
        for work in (self._load, self._recovery):
            if work is not None and not work.done():
                cancel_soon(work)
                await asyncio.wait({work})
        if self._unload is None or self._unload.done():
            self._cut.clear()
            keep = not force if keep is None else keep
            self._unload = owned(self._run_unload(drain_s, force, keep), f"unload {self.id}")
        elif force:
            self._cut.set()
        await self._outcome(self._unload)

    def shut_down(self, reason: Callable[[], HelexaError]) -> None:
        """Nobody is admitted any more and who waits is told so, be it for a seat or for a load. What runs goes on."""
        self._stop_reason = reason
        self._closed = True
        if self.seats is not None:
            self.seats.close(reason)
            self.seats = None
        for work in (self._load, self._recovery):
            if work is not None and not work.done():
                cancel_soon(work)

    async def stop(self, *, keep: bool) -> None:
        """Gone, whatever state it is in; bounded by what a host may take to end, and a prompt cache to be saved."""
        try:
            await self.unload(force=True, keep=keep)
        except HelexaError as err:
            _log.warning("a model did not end well", model=self.id, error=err.message)

    def refusal(self) -> HelexaError:
        """Why a request cannot be served now, for whoever found `seats` to be None."""
        if self.status is Status.UNLOADING:
            return self._unloading()
        if self.status is Status.FAILED:
            return refusals.failed(self.id, self.error)
        if self.status in BUSY:
            return self._still_loading()
        return refusals.not_loaded(self.id, self._house.node)

    @property
    def last_used(self) -> float:
        """Monotonic time at which a request last began or ended; 0.0: never."""
        return self._last_used if self.serving is None else max(self._last_used, self.serving.seats.last_used)

    @property
    def active(self) -> int:
        return 0 if self.serving is None else self.serving.seats.active

    async def measure(self) -> bool:
        """Look at what the host holds now. Whether that is worth an event."""
        placed, serving = self.placed, self.serving
        if placed is None or serving is None:
            return False
        before = sum(placed.claim.measured_mb.values())
        await self._house.devices.measure(placed.claim, serving.host)
        return abs(sum(placed.claim.measured_mb.values()) - before) > before * WORTH_TELLING

    async def recycle(self) -> bool:
        """A fresh host in place of the one it has. Its memory stays reserved, its prompt cache is kept, and who asks
        meanwhile is told that it loads. False where it is in use or not up; LoadFailed where it does not come back."""
        serving = self.serving
        if serving is None or self.status is not Status.LOADED or serving.seats.active or self._gate.locked():
            return False
        self.serving = None
        self._last_used = max(self._last_used, serving.seats.last_used)
        self._cut.clear()
        self.become(Status.RECOVERING)
        serving.seats.close(self._still_loading)
        self._recovery = owned(self._recover(None, serving), f"recycle {self.id}")
        await self._outcome(self._recovery)
        return True

    def save_ahead(self) -> None:
        """Once a second: what an unload would have to write is written while nobody waits for it."""
        serving = self.serving
        if serving is not None and serving.keeper is not None and self.status is Status.LOADED:
            serving.keeper.look(active=serving.seats.active, last_used=serving.seats.last_used)

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

    def become(self, status: ModelStatus, *, error: str | None = None, error_code: str | None = None) -> None:
        assert status in NEXT[self.status], f"{self.id}: {self.status} -> {status}"
        why = {} if error is None else {"error": error}
        _log.info(f"model {status}", model=self.id, before=str(self.status), **why)
        self.status = status
        self.error, self.error_code = error, error_code
        self.progress = None
        self._work_since = time.monotonic()
        open_to_requests = status is Status.LOADED and not self._closed
        self.seats = self.serving.seats if open_to_requests and self.serving is not None else None
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
            self.request, self.spec_hash = request, request.spec_hash()
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
        files = await asyncio.to_thread(house.store.find_local, request)
        if files is None:
            files = await self._download(request, begun)
        started = time.monotonic()
        await house.counters.make_way()
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

    async def _download(self, request: LoadRequest, begun: asyncio.Future[None]) -> ModelFiles:
        """DOWNLOADING from the first byte on, or when the Hub takes its time: until then a refusal (no such
        repository, no downloads here) is the caller's answer and no state of the model."""
        fetching = True

        def begin() -> None:
            if fetching and self.status is not Status.DOWNLOADING:
                self.become(Status.DOWNLOADING)
                begun.set_result(None)

        def tell(progress: Progress) -> None:
            begin()
            if fetching:
                self._on_progress(progress)

        self.failed_download = True
        slow = asyncio.get_running_loop().call_later(PREFLIGHT_S, begin)
        try:
            files = await self._house.store.resolve(request, tell)
        finally:
            fetching = False
            slow.cancel()
        self.failed_download = False
        return files

    async def _start(self, placed: Placed) -> Serving:
        house = self._house
        serving = await start(
            placed,
            hosts=house.hosts,
            devices=house.devices,
            kv_store=house.kv_store,
            on_fraction=self._on_fraction,
        )
        serving.host.died.add_done_callback(lambda died: self._host_died(serving, died.result()))
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
        serving.died()
        self._recovery = owned(self._recover(reason, serving), f"recover {self.id}")

    async def _recover(self, reason: str | None, before: Serving) -> None:
        """Load it again, later each time; give up after GIVE_UP failures in a row. Its memory stays reserved.
        reason: why its host died; None: it did not, and ends now."""
        placed = self.placed
        assert placed is not None
        async with self._gate:
            try:
                if reason is None:
                    await self._retire(before)
                else:
                    await end_host(before.host, placed.claim, 0)
                if placed.claim.stranded:
                    raise refusals.not_ended(self.id)
                placed.claim.measure({}, {})
                while True:
                    if reason is not None:
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

    async def _retire(self, serving: Serving) -> None:
        """Save what it knows, and end it, whatever comes."""
        try:
            await self._unless_cut(serving, serving.save(), SAVE_S)
        finally:
            await surely(serving.close(self._house.devices, QUIT_S))

    async def _run_unload(self, drain_s: float, force: bool, keep: bool) -> None:
        async with self._gate:
            if self.status is Status.FAILED:
                self.become(Status.UNLOADED)
            if self.status is not Status.LOADED or self.serving is None:
                return
            serving = self.serving
            self.become(Status.UNLOADING)
            serving.seats.close(self._unloading)
            if serving.seats.active and not force:
                await self._unless_cut(serving, serving.seats.idle(), drain_s)
            active = serving.seats.active
            if active and not (force or self._cut.is_set() or serving.host.died.done()):
                serving.seats.reopen()
                self.become(Status.LOADED)
                raise refusals.in_use(self.id, active)
            if keep and not active:
                await self._unless_cut(serving, serving.save(), SAVE_S)
            await self._end(serving, 0 if active else QUIT_S)
            if serving.placed.claim.stranded:
                failure = refusals.not_ended(self.id)
                self.become(Status.FAILED, error=failure.message)
                raise failure
            self.become(Status.UNLOADED)
            self._house.devices.tell()

    async def _unless_cut(self, serving: Serving, work: Awaitable[None], within_s: float) -> None:
        """Until it is done, its time is over, the host died, or someone forces the unload."""
        ends: list[asyncio.Future[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(self._cut.wait())]
        try:
            await asyncio.wait([*ends, serving.host.died], timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()

    async def _end(self, serving: Serving, within_s: float) -> None:
        """Its host is gone and its memory back, or its claim stranded."""
        self._last_used = max(self._last_used, serving.seats.last_used)
        self.serving = None
        await serving.close(self._house.devices, within_s)
        self._let_go()

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
            self.become(Status.FAILED, error=err.message, error_code=err.details.get("cause"))
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

    def _check_same(self, asked: str, has: str | None) -> None:
        if asked != has:
            raise refusals.loaded_differently(self.id, self.status, asked, has)

    def _still_loading(self) -> HelexaError:
        return refusals.still_loading(self.id, self._house.node, self.status, self.progress)

    def _unloading(self) -> HelexaError:
        return refusals.unloading(self.id, self._house.node)

    def _was_unloaded(self) -> HelexaError:
        return refusals.was_unloaded(self.id, self._house.node)
