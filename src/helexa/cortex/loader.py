"""Carries out what the swapper decides: finds a place, makes room, loads, wakes those who wait. All calls come from the
loop; `ensure`, `load` and `unload` wait, nothing else does.

Where a model goes and what goes for it is `placement`'s answer over the `Survey` of the fleet. A load that is under way
anywhere, whoever began it, is followed and never begun a second time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Iterable
from functools import partial
from itertools import count
from typing import Any, Final

from helexa.core import logs
from helexa.core.config import CortexSettings
from helexa.core.errors import (
    BadRequest,
    HelexaError,
    NoNode,
    Overloaded,
    ShuttingDown,
    nearest,
)
from helexa.cortex import keeper, load_failures, swapper
from helexa.cortex.admission import Admission
from helexa.cortex.decisions import OPERATOR, By, Decisions, What, Whom
from helexa.cortex.eviction import POLICIES
from helexa.cortex.fallbacks import Outlook
from helexa.cortex.fleet import Fleet
from helexa.cortex.foresight import Foresight
from helexa.cortex.keeper import Keeper
from helexa.cortex.load_watch import LoadWatch
from helexa.cortex.loads import LoadRecord, Loads
from helexa.cortex.nodes import Node
from helexa.cortex.orders import HELD, Orders, status_on
from helexa.cortex.placer import Placer, preference
from helexa.cortex.standing import UNDER_WAY, Standing
from helexa.cortex.survey import Survey, make_of
from helexa.cortex.swapper import Failure, Kind, Phase, Waiter

log = logs.get("cortex.loader")

ROOM_EVERY_S: Final = 0.05  # how often news of room make new plans, at most


class Loader:
    """on_load: called after each load that ended, failed ones too. admission: who waits for a model that is loaded, as
    the Director asks it; what is foreseen knows of it."""

    def __init__(
        self,
        fleet: Fleet,
        settings: CortexSettings,
        *,
        drain_after_s: float = swapper.DRAIN_AFTER_S,
        keep_every_s: float = keeper.EVERY_S,
        copy_idle_s: float = keeper.COPY_IDLE_S,
    ) -> None:
        self.survey = Survey(fleet)
        self.admission = Admission(fleet, settings.loading.queue, time.monotonic)
        self.decisions = Decisions(time.time)
        self._fleet = fleet
        self._orders = Orders(fleet, self.survey)
        policy = POLICIES[settings.eviction.strategy]
        self._placer = Placer(fleet, self.survey, self._orders, policy, self.decisions)
        self._loads = Loads(self.survey, self._orders, self._placer, self.decisions)
        self.on_load = self._loads.on_load
        self._wait_s = settings.loading.wait_s
        self._state = swapper.State(queue=settings.loading.queue, drain_after_s=drain_after_s)
        self._events: deque[swapper.Event] = deque()
        self._stepping = False
        self._watch = LoadWatch(self._told)
        self._waiters: dict[Waiter, asyncio.Future[None]] = {}
        self._asked_by: dict[Waiter, tuple[By, str | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._served: set[Waiter] = set()  # told to go, and not gone yet
        self._placing: dict[str, asyncio.Task[None]] = {}
        self._keeper = Keeper(
            fleet,
            self.survey,
            self._orders,
            self._placer,
            self.decisions,
            ensure=partial(self.ensure, by="preload"),
            load_on=self._loads.copy,
            is_busy=self._is_busy,
            defrag_after_cycles=settings.eviction.defrag_after_cycles,
            every_s=keep_every_s,
            copy_idle_s=copy_idle_s,
        )
        self.foresight = Foresight(
            fleet,
            self._placer,
            policy,
            wait_s=settings.loading.wait_s,
            state=lambda: self._state,
            standing=self._standing,
            error=self._error,
            outlook=self.outlook,
            admission=self.admission,
        )
        self._operators = count()
        self._room: asyncio.TimerHandle | None = None
        self._room_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self.on_load.append(self._loaded)
        fleet.on_change.append(self._changed)

    def start(self) -> None:
        """Keeps the fleet from now on: preloads, copies, unloads of what is idle. After the first polls."""
        self._keeper.start()

    def reconfigured(self) -> None:
        """The fleet has other nodes, or other models."""
        self._keeper.preload()
        self._room_came()

    # for requests

    async def ensure(
        self,
        model_id: str,
        exchange_id: Waiter,
        deadline: float | None = None,
        *,
        by: By = "request",
        request_id: str | None = None,
        client: str | None = None,
    ) -> None:
        """Returns when a node can be asked for the model; loads it where none can. A cancel leaves the queue.

        exchange_id: one waiter's; deadline: of the loop's clock, at most `[loading] wait_s` from now; request_id: as
        its own caller knows it; client: whose share of the queue it takes. Raises ModelLoading, LoadFailed, Overloaded,
        NoNode or ModelNotServable.
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
        self._asked_by[exchange_id] = (by, request_id)
        try:
            until = latest if deadline is None else min(deadline, latest)
            self._feed(swapper.Asked(model_id, exchange_id, until, client, self._room_for(model_id)))
            await future
        finally:
            del self._asked_by[exchange_id]
            if exchange_id in self._served:
                self._served.remove(exchange_id)
                self.survey.handed[model_id] -= 1
            if self._waiters.pop(exchange_id, None) is not None:
                self._feed(swapper.Left(model_id, exchange_id))
            elif future.done() and not future.cancelled():
                future.exception()  # seen, also where a cancel came in the same moment

    def _room_for(self, model_id: str) -> int | None:
        """How many may wait for it, where it has a bound of its own."""
        profile = self._fleet.profiles.get(model_id)
        return profile.limits.waiting if profile is not None and profile.limits is not None else None

    def progress(self, model_id: str) -> bytes | None:
        """How a load stands, for heartbeats: b"loading qwen on beast: 43 %". None where nobody waits for one."""
        pursuit = self._state.wanted.get(model_id)
        return self._standing(model_id).heartbeat() if pursuit is not None and pursuit.waiters else None

    def standing_still(self) -> list[str]:
        """What of it does not get on, a sentence for each; for GET /ready."""
        return self._watch.still(self._state, asyncio.get_running_loop().time())

    def _told(self, model_id: str, name: str) -> Hashable | None:
        """How far the node says that its load is."""
        node = self._fleet.nodes.get(name)
        info = node.models.get(model_id) if node is not None else None
        if info is None or info.progress is None:
            return None
        return (info.status, info.progress.phase, info.progress.fraction, info.progress.bytes_done)

    def outlook(self, model_id: str) -> Outlook:
        """Of a model that is loaded nowhere: when it could be, by what is known of its loads; failing where each node
        that may hold it is left alone for what it did lately."""
        now = asyncio.get_running_loop().time()
        left_alone = {r.failure.node for r in self._state.resting(model_id, now) if r.failure.kind is not Kind.BUSY}
        nodes = [node for node, _ in self._fleet.holders(model_id) if node.name not in left_alone]
        standing, spec = self._standing(model_id), self.survey.spec(model_id)
        if standing.node is not None:
            return Outlook(standing.eta_s)
        known = [self.survey.needs.load_s(spec, make_of(node), node.name) for node in nodes]
        return Outlook(min((s for s in known if s is not None), default=None), is_failing=not nodes)

    # for operators

    async def load(self, model_id: str, node: str | None = None) -> None:
        """Loads it, back-offs forgotten; on `node`, else where it costs the fleet least. What is idle may go for it. A
        name that nobody knows is asked for as well: the node may find it on the Hub. A cancel leaves the load going."""
        self._feed(swapper.Forgive(model_id))
        if node is not None:
            failure = await self._loads.ordered(model_id, self._node_for_load(node))
            if failure is not None:
                raise load_failures.on_node(model_id, failure)
            return
        if self._fleet.where(model_id) or model_id in self._fleet.profiles:
            await self.ensure(model_id, f"operator {next(self._operators)}", by="operator")
            return
        failures: list[Failure] = []
        nodes = [(n, None) for n in self._fleet.nodes.values() if n.state in ("up", "suspect")]
        for target, _ in sorted(nodes, key=preference):
            failure = await self._loads.see_through(model_id, target, OPERATOR)
            if failure is None:
                return
            failures.append(failure)
        raise load_failures.no_place(self._fleet, model_id, failures, 5)

    async def unload(
        self, model_id: str, node: str | None = None, *, force: bool = False, drain_s: float = 0.0
    ) -> None:
        """Unloads it everywhere, or on `node`; nothing to do is success. Raises Conflict (code model_in_use, with
        active_requests) where requests run after drain_s and it is not forced."""
        if node is not None:
            targets = [self._node(node)]
        else:
            targets = [n for n in self._fleet.where(model_id) if status_on(n, model_id) in HELD and n.state != "down"]
        for target in targets:
            why = "forced: requests in progress are cut" if force else "as ordered"
            self.decisions.note("unload", why, OPERATOR, model=model_id, node=target.name)
        outcomes = await asyncio.gather(
            *(self._orders.unload(model_id, n, force=force, drain_s=drain_s) for n in targets), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def stop(self) -> None:
        """Everybody who waits is refused; loads go on at their nodes, unfollowed."""
        self._stopped = True
        if self._changed in self._fleet.on_change:
            self._fleet.on_change.remove(self._changed)
        for timer in (self._timer, self._room):
            if timer is not None:
                timer.cancel()
        self._listen(False)
        await self._keeper.stop()
        self._refuse(tuple(self._waiters), _shutting_down)
        tasks = [*self._tasks, *self._placing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(self._loads.stop(), *tasks, return_exceptions=True)
        self._orders.close()

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
        self._watch.look(self._state, now)
        self._break_promises()
        self._listen(any(p.phase is Phase.RESTING for p in self._state.wanted.values()))
        self._set_timer()

    def _carry_out(self, command: swapper.Command) -> None:
        match command:
            case swapper.Place():
                self._place(command)
            case swapper.Clear():
                self._spawn(self._clear(command))
            case swapper.Load(model, name):
                self._spawn(self._pursue(model, self._fleet.nodes[name]))
            case swapper.Serve(model, waiters):
                for waiter in waiters:
                    future = self._waiters.pop(waiter, None)
                    if future is not None and not future.done():
                        self._served.add(waiter)
                        self.survey.handed[model] += 1
                        future.set_result(None)
            case swapper.Refuse():
                self._note_refusal(command)
                self._refuse(command.waiters, lambda: self._error(command))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refuse(self, waiters: tuple[Waiter, ...], error: Callable[[], HelexaError]) -> None:
        for waiter in waiters:
            future = self._waiters.pop(waiter, None)
            if future is not None and not future.done():
                future.set_exception(error())  # one for each: a traceback grows with every raise

    def _whom(self, waiters: Iterable[Waiter], by: By = "request") -> Whom:
        asked = [self._asked_by[w] for w in waiters if w in self._asked_by]
        return Whom(asked[0][0] if asked else by, tuple(r for _, r in asked if r is not None), len(asked))

    def _whom_of(self, model: str) -> Whom:
        pursuit = self._state.wanted.get(model)
        return self._whom(pursuit.names() if pursuit is not None else ())

    def _note_refusal(self, refusal: swapper.Refuse) -> None:
        what: What = "timed_out" if refusal.why is swapper.Why.TIMED_OUT else "refuse"
        whom = self._whom(refusal.waiters)
        why = self._error(refusal).message
        self.decisions.note(what, why, whom, model=refusal.model, against=refusal.failures)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = swapper.next_wake(self._state)
        if due is not None and not self._stopped:
            # a little late rather than early: a tick before its time would only be set again
            self._timer = asyncio.get_running_loop().call_at(due + 0.002, self._feed, swapper.Tick())

    def _break_promises(self) -> None:
        """Those of loads that were not ordered and will not be."""
        copying = self._keeper.copying
        for (model, name), promise in list(self.survey.promises.items()):
            pursuit = self._state.wanted.get(model)
            if promise.ordered_at is None and model not in copying and (pursuit is None or pursuit.node != name):
                del self.survey.promises[model, name]

    def _is_busy(self, name: str) -> bool:
        """Does a pursuit or a load use this node now?"""
        pursued = any(pursuit.node == name for pursuit in self._state.wanted.values())
        return pursued or self._loads.is_at(name) or any(on == name for _, on in self.survey.promises)

    def _listen(self, on: bool) -> None:
        """Whether a model that becomes idle is news."""
        for node in self._fleet.nodes.values():
            node.on_idle = self._room_came if on else None

    def _room_came(self) -> None:
        if self._room is None and not self._stopped:
            loop = asyncio.get_running_loop()
            self._room = loop.call_later(max(0.0, self._room_at + ROOM_EVERY_S - loop.time()), self._tell_of_room)

    def _tell_of_room(self) -> None:
        self._room, self._room_at = None, asyncio.get_running_loop().time()
        self._feed(swapper.Room())

    # places and room

    def _place(self, command: swapper.Place) -> None:
        """At once; where a node's estimate is needed first, when that has come."""
        model = command.model
        before = self._placing.pop(model, None)
        if before is not None:
            before.cancel()
        nodes = [node for node, _ in self._fleet.holders(model) if node.name not in command.avoid]
        if any(status_on(node, model) in UNDER_WAY for node in nodes) or not self._placer.unknown(model, nodes):
            self._feed(self._placer.place(command, self._state.wanted[model].since, self._whom_of(model)))
            return

        async def ask_first() -> None:
            await self._placer.ask_needs(model, nodes)
            if self._placing.get(model) is task:
                del self._placing[model]
                pursuit = self._state.wanted.get(model)
                if pursuit is not None and pursuit.phase is Phase.PLACING:
                    self._feed(self._placer.place(command, pursuit.since, self._whom_of(model)))

        task = self._placing[model] = asyncio.create_task(ask_first())

    async def _clear(self, command: swapper.Clear) -> None:
        node = self._fleet.nodes.get(command.node)
        if node is None:
            failure: Failure | None = Failure(command.node, Kind.GONE, "is no longer in cortex.toml")
            self._feed(swapper.Cleared(command.model, command.node, failure))
            return
        try:
            whom = self._whom_of(command.model)
            failure = await self._placer.clear(command.model, node, command.victim, whom, drain=command.drain)
        except Exception as err:  # as in _pursue
            log.exception("making room went wrong", model=command.model, node=node.name)
            failure = Failure(node.name, Kind.FAILED, f"{type(err).__name__}: {err}")
        self._feed(swapper.Cleared(command.model, node.name, failure))

    # loads

    async def _pursue(self, model_id: str, node: Node) -> None:
        try:
            failure = await self._loads.see_through(model_id, node, self._whom_of(model_id))
        except Exception as err:  # a fault of ours must not leave everybody waiting for a load that nobody follows
            log.exception("following a load went wrong", model=model_id, node=node.name)
            failure = Failure(node.name, Kind.FAILED, f"{type(err).__name__}: {err}")
        if failure is not None and failure.kind is Kind.DIFFERENT:
            failure = None  # loaded, if not as the catalogue has it: good enough for a request
        self._feed(swapper.Ended(model_id, node.name, failure))

    # what changed, and what to say

    def _loaded(self, record: LoadRecord) -> None:
        if record.error is None:
            self._keeper.loaded(record.node)

    def _changed(self, model_id: str | None) -> None:
        if model_id is not None:
            now = asyncio.get_running_loop().time()
            for node in self._fleet.where(model_id):
                self.survey.saw(model_id, node, now)
            if model_id in self._state.wanted:
                self._watch.look(self._state, now)
            if model_id in self._state.wanted and self._fleet.replicas(model_id):
                self._feed(swapper.Ready(model_id))
        if any(p.phase is Phase.RESTING for p in self._state.wanted.values()):
            self._room_came()

    def _error(self, refusal: swapper.Refuse) -> HelexaError:
        model = refusal.model
        now = asyncio.get_running_loop().time()
        match refusal.why:
            case swapper.Why.QUEUE_FULL:
                bound = self._room_for(model)
                which = f"{self._state.queue} requests wait for it already ([loading] queue)"
                if bound is not None:
                    which = f"{bound} requests wait for it already (its limits)"
                return Overloaded(
                    f"{model} is loading, and {which}",
                    retry_after_s=self._standing(model).retry_after_s,
                )
            case swapper.Why.SHARE_FULL:
                return Overloaded(
                    f"{model} is loading, and as many requests of this client wait for it as it may have while others "
                    f"come too",
                    retry_after_s=self._standing(model).retry_after_s,
                )
            case swapper.Why.TIMED_OUT if any(f.kind is Kind.NO_ROOM for f in refusal.failures):
                return load_failures.no_place(self._fleet, model, refusal.failures, 5)
            case swapper.Why.TIMED_OUT:
                return self._standing(model).still_loading()
            case swapper.Why.NO_PLACE:
                until = [r.until - now for r in self._state.resting(model, now)]
                return load_failures.no_place(self._fleet, model, refusal.failures, min(until, default=5))

    def _standing(self, model_id: str) -> Standing:
        pursuit = self._state.wanted.get(model_id)
        node = self._fleet.nodes.get(pursuit.node) if pursuit is not None and pursuit.node is not None else None
        if pursuit is None or node is None:
            return Standing(model_id)
        took_s = self.survey.needs.load_s(self.survey.spec(model_id), make_of(node), node.name)
        began = self._loads.began(model_id, node.name)
        left_s = None
        if took_s is not None and began is not None:
            left_s = took_s - (asyncio.get_running_loop().time() - began)
        is_clearing = pursuit.phase is Phase.CLEARING
        return Standing(model_id, node.name, node.models.get(model_id), left_s, is_clearing=is_clearing)

    def _node(self, name: str) -> Node:
        node = self._fleet.nodes.get(name)
        if node is None:
            close = nearest(name, list(self._fleet.nodes)) or list(self._fleet.nodes)
            raise BadRequest(f"no node is called {name!r}; known: {', '.join(close) or 'none'}", param="node")
        if node.state == "down":
            raise NoNode(f"{name} is down ({node.last_error})")
        return node

    def _node_for_load(self, name: str) -> Node:
        node = self._node(name)
        if node.is_set_aside:
            raise NoNode(f"{name} is drained and takes no loads; `cortex resume {name}` ends that")
        return node


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("this gateway is shutting down; try again in a moment")
