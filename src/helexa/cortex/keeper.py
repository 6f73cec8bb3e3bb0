"""What is done for the fleet though no request waits: models are preloaded, copied where their queue is long, given up
when they have been idle for long, and nodes are asked to defragment after many loads.

Once a second, from the same facts and plans as the loader's. Nothing here disturbs a request: copies go into free room
(a very long queue may displace what is idle), and only what is idle is unloaded.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from helexa.core import logs
from helexa.core.errors import HelexaError, ModelNotServable
from helexa.core.lifecycle import ModelStatus
from helexa.cortex.decisions import UPKEEP, Decisions, What
from helexa.cortex.eviction import expired
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import Node
from helexa.cortex.orders import Orders, status_on
from helexa.cortex.placer import Placer
from helexa.cortex.standing import UNDER_WAY
from helexa.cortex.survey import Survey
from helexa.cortex.swapper import Failure

log = logs.get("cortex.keeper")

EVERY_S: Final = 1.0
COPY_AT: Final = 4  # queued requests; measured: at one a second copy only costs loads
COPY_DISPLACES_AT: Final = (
    16  # a full fleet would let a saturated model queue for hours (docs/explanation/placement.md)
)
COPY_IDLE_S: Final = 60.0  # a copy of ours that nobody asked for so long is given up
AGAIN_S: Final = 30.0  # after a copy, a preload, an unload or a defragmentation that failed


class Keeper:
    """ensure: a load by whatever way the loader has, for `waiter`. load_on: one load on one node.
    is_busy: does a load of this gateway clear or use the node now?"""

    def __init__(
        self,
        fleet: Fleet,
        survey: Survey,
        orders: Orders,
        placer: Placer,
        decisions: Decisions,
        *,
        ensure: Callable[[str, str], Awaitable[None]],
        load_on: Callable[[str, Node], Awaitable[Failure | None]],
        is_busy: Callable[[str], bool],
        defrag_after_cycles: int,
        every_s: float = EVERY_S,
        copy_idle_s: float = COPY_IDLE_S,
    ) -> None:
        self._fleet = fleet
        self._survey = survey
        self._orders = orders
        self._placer = placer
        self._decisions = decisions
        self._ensure = ensure
        self._load_on = load_on
        self._is_busy = is_busy
        self._defrag_after = defrag_after_cycles
        self._every_s = every_s
        self._copy_idle_s = copy_idle_s
        self._cycles: Counter[str] = Counter()  # loads since the last defragmentation, by node
        self._copies: set[tuple[str, str]] = set()  # that this gateway made: model, node
        self._work: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._preloaded: set[str] = set()  # or being so
        self._rests: dict[tuple[str, str], float] = {}
        self._ticker: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._ticker = asyncio.create_task(self._keep())
        self.preload()

    def preload(self) -> None:
        """What the catalogue wants preloaded, and was not yet."""
        wanted = {model_id for model_id, profile in self._fleet.profiles.items() if profile.preload}
        self._preloaded &= wanted
        for model_id in wanted - self._preloaded:
            self._preloaded.add(model_id)
            self._do("preload", model_id, self._preload(model_id))

    async def stop(self) -> None:
        tasks = [*self._work.values(), *([self._ticker] if self._ticker is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def loaded(self, node: str) -> None:
        """A load there has ended well."""
        self._cycles[node] += 1

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                self._tick(asyncio.get_running_loop().time())
            except Exception:
                log.exception("keeping the fleet went wrong")

    def _tick(self, now: float) -> None:
        for node in self._fleet.nodes.values():
            if node.state in ("up", "suspect"):
                self._give_up(node, now)
                if self._defrag_after and self._cycles[node.name] >= self._defrag_after and not self._in_use(node):
                    self._do("defrag", node.name, self._defrag(node))
        for model_id, queued in self._queues().items():
            if queued >= COPY_AT and self._may_copy(model_id):
                self._do("copy", model_id, self._copy(model_id, displaces=queued >= COPY_DISPLACES_AT))

    def _do(self, what: str, whom: str, work: Coroutine[Any, Any, None]) -> None:
        """Once at a time, and not again soon after it failed."""
        key = (what, whom)
        if key in self._work or self._rests.get(key, 0.0) > asyncio.get_running_loop().time():
            work.close()
            return
        self._rests.pop(key, None)
        task = self._work[key] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._work.pop(key, None))

    def _rest(self, what: str, whom: str) -> None:
        self._rests[what, whom] = asyncio.get_running_loop().time() + AGAIN_S

    # preload

    async def _preload(self, model_id: str) -> None:
        """Until it was loaded once: its node may come later than the gateway."""
        while model_id in self._preloaded:
            try:
                await self._ensure(model_id, f"preload {model_id}")
                return
            except ModelNotServable as err:
                log.error("a model is not preloaded", model=model_id, error=err.message)
                return
            except HelexaError as err:
                log.warning("a model is not preloaded yet", model=model_id, error=err.message)
                await asyncio.sleep(min(AGAIN_S, max(1.0, err.retry_after_s or 1.0)))

    # what nobody asks for any more

    def _give_up(self, node: Node, now: float) -> None:
        [view] = self._survey.views([node.name], now)
        for resident in expired(view.residents, now):
            why = f"nobody has asked for it for {now - resident.last_used:,.0f} s; its ttl_s is {resident.ttl_s:g}"
            self._do("unload", f"{resident.model} {node.name}", self._unload(resident.model, node, "expire", why))
        for resident in view.residents:
            key = (resident.model, node.name)
            idle = not resident.is_busy and now - resident.last_used >= self._copy_idle_s
            if key in self._copies and resident.copies > 1 and idle and resident.state is ModelStatus.LOADED:
                why = f"a further replica, idle for {now - resident.last_used:,.0f} s"
                self._do("unload", f"{resident.model} {node.name}", self._unload(resident.model, node, "give_up", why))

    async def _unload(self, model_id: str, node: Node, what: What, why: str) -> None:
        try:
            await self._orders.unload(model_id, node)
        except HelexaError as err:
            log.info("an idle model stays", model=model_id, node=node.name, reason=err.message)
            self._rest("unload", f"{model_id} {node.name}")
            return
        self._copies.discard((model_id, node.name))
        self._decisions.note(what, why, UPKEEP, model=model_id, node=node.name)
        log.info("an idle model is given up", model=model_id, node=node.name, why=why)

    # copies

    def _queues(self) -> Counter[str]:
        """Requests beyond the slots, by model."""
        queued: Counter[str] = Counter()
        for node in self._fleet.nodes.values():
            for model_id, replica in node.replicas.items():
                beyond = replica.beyond_slots
                if beyond > 0:
                    queued[model_id] += beyond
        return queued

    def _may_copy(self, model_id: str) -> bool:
        profile = self._fleet.profiles.get(model_id)
        most = profile.max_replicas if profile is not None else None
        held = [node for node in self._fleet.where(model_id) if node.state != "down"]
        if any(status_on(node, model_id) in UNDER_WAY for node in held):
            return False
        return most is None or len(self._fleet.replicas(model_id)) < most

    async def _copy(self, model_id: str, *, displaces: bool) -> None:
        plan = self._placer.copy(model_id, displaces=displaces)
        if plan is None:
            return
        node = self._fleet.nodes[plan.node]
        try:
            log.info("a copy is made", model=model_id, node=plan.node, victims=list(plan.victims))
            for victim in plan.victims:
                if await self._placer.clear(model_id, node, victim, UPKEEP, drain=False) is not None:
                    self._rest("copy", model_id)
                    return
            if await self._load_on(model_id, node) is None:
                self._copies.add((model_id, node.name))
            else:
                self._rest("copy", model_id)
        finally:
            promise = self._survey.promises.get((model_id, node.name))
            if promise is not None and promise.ordered_at is None:
                del self._survey.promises[model_id, node.name]

    @property
    def copying(self) -> set[str]:
        """Models of which a copy is being made."""
        return {whom for what, whom in self._work if what == "copy"}

    # defragmentation

    def _in_use(self, node: Node) -> bool:
        working = any(info.parsed_status in UNDER_WAY for info in node.models.values())
        requests = any(r.inflight or r.others or self._survey.handed[m] for m, r in node.replicas.items())
        return working or requests or self._is_busy(node.name)

    async def _defrag(self, node: Node) -> None:
        said = await self._orders.defrag(node)
        if isinstance(said, Failure):
            log.info("a node does not defragment now", node=node.name, reason=said.reason)
            self._rest("defrag", node.name)
            return
        cycles, self._cycles[node.name] = self._cycles[node.name], 0
        self._decisions.note("defrag", f"{cycles} loads since the last time", UPKEEP, node=node.name)
        log.info("a node has defragmented", node=node.name, after_loads=cycles, **said)
