"""Carries out what the swapper decides: asks nodes to load and unload, follows a load until it is over, wakes those who
wait. All calls come from the loop; `ensure`, `load` and `unload` wait, nothing else does.

A load that is under way anywhere, whoever began it, is followed and never begun a second time. What an action of ours
did is written into the fleet's view at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import msgspec

from helexa.core import logs
from helexa.core.config import CortexSettings
from helexa.core.errors import (
    BadRequest,
    Conflict,
    HelexaError,
    NoNode,
    Overloaded,
    ShuttingDown,
    UpstreamError,
    nearest,
)
from helexa.core.lifecycle import LoadRequest, ModelInfo, ModelStatus, UnloadRequest
from helexa.cortex import load_failures, swapper
from helexa.cortex.fleet import Fleet, Node
from helexa.cortex.standing import UNDER_WAY, Standing
from helexa.cortex.swapper import Failure, Kind, Waiter

log = logs.get("cortex.loader")

# A node answers a load once it knows the file and the memory; that may include asking the Hub about a repository.
ANSWER_S: Final = 60.0

_HELD: Final = UNDER_WAY | {ModelStatus.LOADED, ModelStatus.UNLOADING}


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """One load that this gateway saw through. seconds: from the order to its end."""

    model: str
    node: str
    seconds: float
    error: str | None


class Loader:
    """on_load: called after each load that ended, failed ones too."""

    def __init__(self, fleet: Fleet, settings: CortexSettings) -> None:
        self._fleet = fleet
        self._wait_s = settings.loading.wait_s
        self._state = swapper.State(queue=settings.loading.queue)
        self._events: deque[swapper.Event] = deque()
        self._stepping = False
        self._waiters: dict[Waiter, asyncio.Future[None]] = {}
        self._loads: dict[tuple[str, str], asyncio.Task[Failure | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._followers: dict[str, set[asyncio.Event]] = {}
        self._took_s: dict[tuple[str, str], float] = {}  # the latest load of a model on a node, for the estimate
        self._began: dict[tuple[str, str], float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self.on_load: list[Callable[[LoadRecord], None]] = []
        fleet.on_change.append(self._changed)

    # for requests

    async def ensure(self, model_id: str, exchange_id: Waiter, deadline: float | None = None) -> None:
        """Returns when a node can be asked for the model; loads it where none can. A cancel leaves the queue.

        exchange_id: one waiter's; deadline: of the loop's clock, at most `[loading] wait_s` from now. Raises
        ModelLoading, LoadFailed, Overloaded, NoNode or ModelNotServable.
        """
        if self._fleet.replicas(model_id):
            return
        if self._stopped:
            raise _shutting_down()
        loop = asyncio.get_running_loop()
        latest = loop.time() + self._wait_s
        future: asyncio.Future[None] = loop.create_future()
        assert exchange_id not in self._waiters, "one request waits once"
        self._waiters[exchange_id] = future
        try:
            self._feed(swapper.Asked(model_id, exchange_id, latest if deadline is None else min(deadline, latest)))
            await future
        finally:
            if self._waiters.pop(exchange_id, None) is not None:
                self._feed(swapper.Left(model_id, exchange_id))
            elif future.done() and not future.cancelled():
                future.exception()  # seen, also where a cancel came in the same moment

    def progress(self, model_id: str) -> bytes | None:
        """How a load stands, for heartbeats: b"loading qwen on beast: 43 %". None where nobody waits for one."""
        pursuit = self._state.wanted.get(model_id)
        return self._standing(model_id).heartbeat() if pursuit is not None and pursuit.waiters else None

    # for operators

    async def load(self, model_id: str, node: str | None = None) -> None:
        """Loads it, back-offs forgotten; on `node`, else where there is most room. A name that nobody knows is asked
        for as well: the node may find it on the Hub. A cancel leaves the load going."""
        self._feed(swapper.Forgive(model_id))
        if node is not None:
            failure = await self._see_through(model_id, self._node(node))
            if failure is not None:
                raise load_failures.on_node(model_id, failure)
            return
        failures: list[Failure] = []
        while not self._fleet.replicas(model_id):
            target = self._next_node(model_id, {f.node for f in failures}, anywhere=True)
            if target is None:
                raise load_failures.no_place(self._fleet, model_id, failures, 5)
            failure = await self._see_through(model_id, target)
            if failure is None:
                return
            failures.append(failure)

    async def unload(
        self, model_id: str, node: str | None = None, *, force: bool = False, drain_s: float = 0.0
    ) -> None:
        """Unloads it everywhere, or on `node`; nothing to do is success. Raises Conflict (code model_in_use, with
        active_requests) where requests run after drain_s and it is not forced."""
        if node is not None:
            targets = [self._node(node)]
        else:
            targets = [n for n in self._fleet.where(model_id) if _status(n, model_id) in _HELD and n.state != "down"]
        outcomes = await asyncio.gather(
            *(self._unload_on(model_id, n, force, drain_s) for n in targets), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def stop(self) -> None:
        """Everybody who waits is refused; loads go on at their nodes, unfollowed."""
        self._stopped = True
        if self._changed in self._fleet.on_change:
            self._fleet.on_change.remove(self._changed)
        if self._timer is not None:
            self._timer.cancel()
        self._refuse(tuple(self._waiters), _shutting_down)
        tasks = [*self._loads.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # the swapper's hands

    def _feed(self, event: swapper.Event) -> None:
        """One event, and all that follows from it. Carrying out a command may bring the next event."""
        self._events.append(event)
        if self._stepping:
            return
        now = asyncio.get_running_loop().time()
        self._stepping = True
        try:
            while self._events:
                self._state, commands = swapper.step(self._state, self._events.popleft(), now)
                for command in commands:
                    self._carry_out(command)
        finally:
            self._stepping = False
        self._set_timer()

    def _carry_out(self, command: swapper.Command) -> None:
        match command:
            case swapper.Place(model, avoid):
                node = self._next_node(model, avoid)
                self._feed(swapper.NoPlace(model) if node is None else swapper.Placed(model, node.name))
            case swapper.Load(model, name):
                task = asyncio.create_task(self._pursue(model, self._fleet.nodes[name]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case swapper.Serve(_, waiters):
                for waiter in waiters:
                    future = self._waiters.pop(waiter, None)
                    if future is not None and not future.done():
                        future.set_result(None)
            case swapper.Refuse():
                self._refuse(command.waiters, lambda: self._error(command))

    def _refuse(self, waiters: tuple[Waiter, ...], error: Callable[[], HelexaError]) -> None:
        for waiter in waiters:
            future = self._waiters.pop(waiter, None)
            if future is not None and not future.done():
                future.set_exception(error())  # one for each: a traceback grows with every raise

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = swapper.next_wake(self._state)
        if due is not None and not self._stopped:
            # a little late rather than early: a tick before its time would only be set again
            self._timer = asyncio.get_running_loop().call_at(due + 0.002, self._feed, swapper.Tick())

    def _next_node(self, model_id: str, avoid: set[str] | frozenset[str], *, anywhere: bool = False) -> Node | None:
        """Where to load it: where a load is under way; then on nodes that are up before suspect ones, where the file
        is before where it must be fetched, where most memory is free. anywhere: also a name that nobody knows."""
        holders = self._fleet.holders(model_id)
        if not holders and anywhere and not self._fleet.where(model_id) and model_id not in self._fleet.profiles:
            holders = [(n, None) for n in self._fleet.nodes.values() if n.state in ("up", "suspect")]
        able = [(node, info) for node, info in holders if node.name not in avoid]
        return min(able, key=_preference, default=(None, None))[0]

    async def _pursue(self, model_id: str, node: Node) -> None:
        try:
            failure = await self._see_through(model_id, node)
        except Exception as err:  # a fault of ours must not leave everybody waiting for a load that nobody follows
            log.exception("following a load went wrong", model=model_id, node=node.name)
            failure = Failure(node.name, Kind.FAILED, f"{type(err).__name__}: {err}")
        if failure is not None and failure.kind is Kind.DIFFERENT:
            failure = None  # loaded, if not as the catalogue has it: good enough for a request
        self._feed(swapper.Ended(model_id, node.name, failure))

    async def _see_through(self, model_id: str, node: Node) -> Failure | None:
        """One load on one node from order to end, shared by all who want it; a cancel leaves it going."""
        key = (model_id, node.name)
        task = self._loads.get(key)
        if task is None:
            task = self._loads[key] = asyncio.create_task(self._load_on(model_id, node))
            task.add_done_callback(lambda _: self._loads.pop(key, None))
        return await asyncio.shield(task)

    async def _load_on(self, model_id: str, node: Node) -> Failure | None:
        key = (model_id, node.name)
        loop = asyncio.get_running_loop()
        began = self._began[key] = loop.time()
        try:
            failure = None if _status(node, model_id) in UNDER_WAY else await self._order(model_id, node)
            if failure is None:
                failure = await self._follow(model_id, node)
        finally:
            del self._began[key]
        seconds = loop.time() - began
        if failure is None:
            self._took_s[key] = seconds
            log.info("model is loaded", model=model_id, node=node.name, seconds=round(seconds, 2))
        else:
            log.warning("load failed", model=model_id, node=node.name, kind=failure.kind.value, reason=failure.reason)
        record = LoadRecord(model_id, node.name, seconds, failure.reason if failure else None)
        for call in self.on_load:
            call(record)
        return failure

    async def _order(self, model_id: str, node: Node) -> Failure | None:
        """POST /models/load, given up where the node dies over it. None: it is loaded or under way."""
        order = asyncio.create_task(self._post_load(model_id, node))
        try:
            with self._watching(model_id) as changed:
                order.add_done_callback(lambda _: changed.set())
                while not order.done() and node.state != "down":
                    changed.clear()
                    await changed.wait()
            return order.result() if order.done() else _gone(node)
        finally:
            order.cancel()

    async def _post_load(self, model_id: str, node: Node) -> Failure | None:
        profile, listed = self._fleet.profiles.get(model_id), node.models.get(model_id)
        if profile is not None:
            request = profile.load_request()
        else:
            request = LoadRequest(model_id=listed.id if listed is not None else model_id)
        asked = time.monotonic()
        try:
            answer = await node.upstream.fetch("POST", "/models/load", msgspec.json.encode(request), timeout_s=ANSWER_S)
        except (OSError, TimeoutError, ValueError) as err:
            self._fleet.request_failed(node, _words(err))
            return Failure(node.name, Kind.GONE, f"did not answer ({_words(err)})")
        if answer.status in (200, 202):
            status = ModelStatus.LOADED if answer.status == 200 else ModelStatus.LOADING
            self._fleet.mark(node, request.model_id, status, asked=asked)
            self._fleet.doubt(node)
            return None
        failure = load_failures.read_refusal(node.name, answer.status, answer.body)
        if failure.kind is Kind.DIFFERENT:
            self._fleet.mark(node, request.model_id, ModelStatus.LOADED, asked=asked)
            self._fleet.doubt(node)
        return failure

    async def _follow(self, model_id: str, node: Node) -> Failure | None:
        """Until the fleet's view says that it is loaded, or will not be."""
        with self._watching(model_id) as changed:
            while True:
                info, status = node.models.get(model_id), _status(node, model_id)
                if status is ModelStatus.LOADED:
                    return None
                if node.state == "down":
                    return _gone(node)
                if status is ModelStatus.FAILED:
                    reason = info.error if info is not None and info.error else "the load failed, without a reason"
                    return Failure(node.name, Kind.FAILED, reason)
                if info is None or status is ModelStatus.UNLOADED:
                    why = (info.error if info is not None else None) or "it was unloaded, or the node restarted"
                    return Failure(node.name, Kind.FAILED, f"gave up the load: {why}")
                changed.clear()
                await changed.wait()

    @contextmanager
    def _watching(self, model_id: str) -> Iterator[asyncio.Event]:
        """An event that is set with each change of the model or of a node."""
        changed = asyncio.Event()
        followers = self._followers.setdefault(model_id, set())
        followers.add(changed)
        try:
            yield changed
        finally:
            followers.discard(changed)
            if not followers:
                self._followers.pop(model_id, None)

    async def _unload_on(self, model_id: str, node: Node, force: bool, drain_s: float) -> None:
        listed = node.models.get(model_id)
        if listed is None or listed.parsed_status not in _HELD:
            return
        before = ModelStatus(listed.status)
        self._fleet.mark(node, listed.id, ModelStatus.UNLOADING)  # nothing new goes there from now on
        asked = time.monotonic()
        body = msgspec.json.encode(UnloadRequest(model_id=listed.id, drain_s=drain_s, force=force))
        try:
            answer = await node.upstream.fetch("POST", "/models/unload", body, timeout_s=drain_s + ANSWER_S)
        except (OSError, TimeoutError, ValueError) as err:
            self._fleet.mark(node, listed.id, before, asked=asked)
            self._fleet.request_failed(node, _words(err))
            raise NoNode(f"{node.name} did not answer the unload of {model_id} ({_words(err)})") from err
        if answer.status in (200, 202, 404):
            self._fleet.mark(node, listed.id, ModelStatus.UNLOADED, asked=asked)
            self._fleet.doubt(node)
            return
        self._fleet.mark(node, listed.id, before, asked=asked)
        self._fleet.doubt(node)
        said = f"{model_id} on {node.name}: {load_failures.refusal_message(answer.body)}"
        if answer.status == 409:
            raise Conflict(said, code="model_in_use", details=load_failures.active_requests(answer.body))
        raise UpstreamError(said)

    # what changed, and what to say

    def _changed(self, model_id: str | None) -> None:
        if model_id is None:
            events = [event for events in self._followers.values() for event in events]
        else:
            events = list(self._followers.get(model_id, ()))
            if model_id in self._state.wanted and self._fleet.replicas(model_id):
                self._feed(swapper.Ready(model_id))
        for event in events:
            event.set()

    def _error(self, refusal: swapper.Refuse) -> HelexaError:
        model = refusal.model
        now = asyncio.get_running_loop().time()
        match refusal.why:
            case swapper.Why.QUEUE_FULL:
                return Overloaded(
                    f"{model} is loading, and {self._state.queue} requests wait for it already ([loading] queue)",
                    retry_after_s=self._standing(model).retry_after_s,
                )
            case swapper.Why.TIMED_OUT:
                return self._standing(model).still_loading()
            case swapper.Why.NO_PLACE:
                until = [r.until - now for r in self._state.resting(model, now)]
                return load_failures.no_place(self._fleet, model, refusal.failures, min(until, default=5))

    def _standing(self, model_id: str) -> Standing:
        pursuit = self._state.wanted.get(model_id)
        if pursuit is None or pursuit.node is None:
            return Standing(model_id)
        key = (model_id, pursuit.node)
        took_s, began = self._took_s.get(key), self._began.get(key)
        left_s = None
        if took_s is not None and began is not None:
            left_s = took_s - (asyncio.get_running_loop().time() - began)
        return Standing(model_id, pursuit.node, self._fleet.nodes[pursuit.node].models.get(model_id), left_s)

    def _node(self, name: str) -> Node:
        node = self._fleet.nodes.get(name)
        if node is None:
            close = nearest(name, list(self._fleet.nodes)) or list(self._fleet.nodes)
            raise BadRequest(f"no node is called {name!r}; known: {', '.join(close) or 'none'}", param="node")
        if node.state == "down":
            raise NoNode(f"{name} is down ({node.last_error})")
        return node


def _status(node: Node, model_id: str) -> ModelStatus | None:
    info = node.models.get(model_id)
    return info.parsed_status if info is not None else None


def _gone(node: Node) -> Failure:
    return Failure(node.name, Kind.GONE, f"died during the load ({node.last_error})")


def _preference(candidate: tuple[Node, ModelInfo | None]) -> tuple[bool, bool, bool, bool, int]:
    node, info = candidate
    status = info.parsed_status if info is not None else None
    # free room that is unknown sorts with none: such a node is asked last, not never
    return (
        status not in UNDER_WAY,
        node.state != "up",
        status is ModelStatus.UNLOADING,
        info is None,
        -(node.free_mb or 0),
    )


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("this gateway is shutting down; try again in a moment")


def _words(err: BaseException) -> str:
    return str(err) or ("no answer in time" if isinstance(err, TimeoutError) else type(err).__name__)
