"""The leader's side of its ranks: starts them, asks them, and sees to it that none is left.

Owned by one loop. Ranks 1 to N-1 are processes; the leader itself is rank 0, and enters collectives from a thread of
its own, after every rank has been told to. Whatever goes wrong with one rank ends all of them: a group that lost one is
good for nothing, and a rank that waits in a collective cannot be asked to leave it.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, cast

import msgspec

from helexa.core import logs
from helexa.neuron.tp import rpc
from helexa.neuron.tp.collective import TIMEOUT_S, Collective, CollectiveFailed
from helexa.neuron.tp.comm import Comm
from helexa.neuron.tp.rank import PoolFailed, Rank
from helexa.neuron.tp.rendezvous import open_collective

__all__ = ["PoolFailed", "WorkerPool"]

_log = logs.get("neuron.tp")

PING_S: Final = 10.0  # a machine under load starts a process slowly; a well one answers within 0.2 s
INIT_S: Final = TIMEOUT_S  # torch's import among it
CHECK_S: Final = 60.0
ASK_S: Final = 10.0
CLOSE_S: Final = 1.0  # the leader's side of a group that nobody else is in
SHUTDOWN_S: Final = 5.0

T = TypeVar("T")
R = TypeVar("R", bound=rpc.Response)


class WorkerPool:
    """The ranks of one model. Use it as `async with await WorkerPool.spawn(...)`: nothing is left behind it.

    failed: set, with the reason, when a rank ends or sends nonsense; every rank is being killed by then
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.collective: Collective | None = None
        self._left: Collective | None = None  # to be closed
        self._ranks: list[Rank] = []
        self._ids = itertools.count(1)  # of frames; taken by the loop's thread and the engine's
        self._ending: asyncio.Task[None] | None = None
        self._ended = threading.Event()  # no group is to be entered any more; the leader's own thread looks at it

    @classmethod
    async def spawn(
        cls, program: Sequence[str], world_size: int, devices: Sequence[int], options: Sequence[str] = ()
    ) -> WorkerPool:
        """Start ranks 1 to world_size - 1. program: what `neuron` is, e.g. ["neuron"]. devices: by rank, the leader's
        first. options: more of a rank's own (worker.py). Called from the thread that lives as long as the pool: a
        rank dies with its spawning thread."""
        if len(devices) != world_size:
            raise ValueError(f"{world_size} ranks need {world_size} devices, not {len(devices)}")
        pool = cls(world_size)
        try:
            for rank in range(1, world_size):
                made = Rank(rank, devices[rank], pool.fail)
                pool._ranks.append(made)
                await made.start(program, world_size, options)
        except OSError as err:
            await pool.close()
            raise PoolFailed(f"rank {len(pool._ranks)} could not be started: {program[0]}: {err}") from err
        except BaseException:
            await pool.close()
            raise
        return pool

    async def __aenter__(self) -> WorkerPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    async def ping_all(self, within_s: float = PING_S) -> None:
        """Raises PoolFailed unless each rank answers, with its own rank and device."""
        for rank, pong in zip(self._ranks, await self._all(lambda _: rpc.Ping(), rpc.Pong, within_s), strict=True):
            told = (pong.rank, pong.world_size, pong.cuda_device)
            if told != (rank.rank, self.world_size, rank.device):
                raise await self._broken(
                    f"rank {rank.rank} of {self.world_size} on device {rank.device} answers as rank {told[0]} of "
                    f"{told[1]} on device {told[2]}"
                )

    async def init(self, comm: Comm, device: int = 0, within_s: float = INIT_S) -> Collective:
        """Every rank is told before the leader enters its own side. Raises PoolFailed; the ranks are gone then."""

        def enter() -> Collective:
            group = open_collective(comm, 0, self.world_size, device, timeout_s=within_s, ended=self._ended)
            if self._ended.is_set():  # while it came together, a rank failed
                group.close()
                raise CollectiveFailed("the group was ended")
            return group

        group, _ = await self._with_leader(enter, lambda _: rpc.Init(comm_id=comm.id), rpc.InitOk, within_s)
        self.collective = group
        return group

    async def sanity_check(self, within_s: float = CHECK_S) -> None:
        """Sum a one of each rank; every rank must see them all."""
        collective = self.collective
        if collective is None:
            raise PoolFailed("the leader is in no group; init first")
        own, answers = await self._with_leader(
            collective.count_ranks, lambda _: rpc.NcclSanityCheck(), rpc.NcclSanityResult, within_s
        )
        seen = [own, *(answer.observed_sum for answer in answers)]
        if any(count != self.world_size for count in seen):
            raise await self._broken(f"of {self.world_size} ranks, ranks 0 to {self.world_size - 1} saw {seen}")

    async def load(
        self, own: Callable[[], T], specs: Sequence[dict[str, Any]], within_s: float
    ) -> tuple[T, list[rpc.LoadShardOk]]:
        """Every rank loads its part, the leader with `own`, all at once. specs: by rank, the leader's first, for the
        loader. Raises PoolFailed; the ranks are gone then."""
        return await self._with_leader(own, lambda rank: rpc.LoadShard(spec=specs[rank]), rpc.LoadShardOk, within_s)

    def post_step(self, step: msgspec.Raw) -> None:
        """HOT, once a step. Written to every rank when it returns, and the caller enters its own side; a rank that
        answers with anything but step_ok ends the pool. From any thread, one at a time. Bench: bench/tp."""
        frame_id = next(self._ids)
        line = rpc.line(rpc.Step(id=frame_id, step=step))
        for rank in self._ranks:
            rank.post(frame_id, line)

    async def drop(self, slabs: list[int], within_s: float = ASK_S) -> None:
        """Every rank forgets the keys and values of these. Between steps."""
        await self._all(lambda _: rpc.Drop(slabs=slabs), rpc.DropOk, within_s)

    async def clear(self, within_s: float = ASK_S) -> None:
        """Every rank forgets all keys and values. Between steps."""
        await self._all(lambda _: rpc.Clear(), rpc.ClearOk, within_s)

    async def memory(self, within_s: float = ASK_S) -> list[rpc.QueryMemoryOk]:
        """Of ranks 1 to world_size - 1; it waits for a step that runs."""
        return await self._all(lambda _: rpc.QueryMemory(), rpc.QueryMemoryOk, within_s)

    async def unload(self, within_s: float = CHECK_S) -> None:
        """Every rank gives back its shard's memory, and stays in the group."""
        await self._all(lambda _: rpc.Unload(), rpc.UnloadOk, within_s)

    async def shutdown(self, within_s: float = SHUTDOWN_S) -> None:
        """Every rank says bye and is reaped; one that does not is killed."""
        self._leave_group()
        await asyncio.gather(*(rank.leave(next(self._ids), within_s) for rank in self._ranks))
        await self._end_seen()
        await self._close_group()

    async def close(self) -> None:
        """Every rank is killed and reaped. Idempotent."""
        self._leave_group()
        await asyncio.gather(*(rank.kill() for rank in self._ranks))
        await self._end_seen()
        await self._close_group()

    def fail(self, reason: str) -> None:
        """End every rank, undrained; the first reason is kept. From the loop's thread."""
        if self.failed.done():
            return
        self.failed.set_result(reason)
        _log.error("a rank failed; the others are ended with it", reason=reason)
        self._leave_group()
        self._ending = asyncio.get_running_loop().create_task(self.close())

    # inside

    async def _all(self, request: Callable[[int], rpc.Request], answer: type[R], within_s: float) -> list[R]:
        """The same of each rank, at once. Raises PoolFailed with what went wrong; the ranks are gone then."""
        return await self._settle(self._send(request, answer, within_s))

    def _send(self, request: Callable[[int], rpc.Request], answer: type[R], within_s: float) -> list[asyncio.Future[R]]:
        """Written to every rank when it returns. request: made for each rank."""
        sent = [(rank, rank.send(next(self._ids), request(rank.rank))) for rank in self._ranks]
        return [asyncio.ensure_future(rank.receive(response, answer, within_s)) for rank, response in sent]

    async def _with_leader(
        self, enter: Callable[[], T], request: Callable[[int], rpc.Request], answer: type[R], within_s: float
    ) -> tuple[T, list[R]]:
        """What every rank does together, the leader in a thread. Whoever fails first ends it for all."""
        ranks = self._send(request, answer, within_s)
        leader = _in_thread(enter, within_s)
        _, *answers = await self._settle(cast("list[asyncio.Future[Any]]", [leader, *ranks]))
        return leader.result(), answers

    async def _settle(self, asked: list[asyncio.Future[R]]) -> list[R]:
        """Every result. The first failure ends the pool; the reasons are those that were there before that."""
        if asked:
            await asyncio.wait(asked, return_when=asyncio.FIRST_EXCEPTION)
        errors = [error for future in asked if future.done() and (error := future.exception()) is not None]
        if errors:
            broken = await self._broken("; ".join(str(error) for error in errors))
            broken.out_of_memory = any(isinstance(error, PoolFailed) and error.out_of_memory for error in errors)
            for future in asked:
                future.add_done_callback(_seen)
            raise broken
        return [future.result() for future in asked]

    async def _broken(self, reason: str) -> PoolFailed:
        """A group with one bad rank has none: all are killed, undrained."""
        if not self.failed.done():
            self.failed.set_result(reason)
        await self.close()
        return PoolFailed(reason)

    def _leave_group(self) -> None:
        """Whoever waits in it wakes, where the backend can do that."""
        self._ended.set()
        if self.collective is not None:
            self._left, self.collective = self.collective, None
            self._left.abort()

    async def _close_group(self) -> None:
        """Only once the other ranks have ended: that wakes a leader's thread which is inside it over Gloo."""
        left, self._left = self._left, None
        if left is not None:
            closing = _in_thread(left.close, CLOSE_S)
            await asyncio.wait({closing})
            _seen(closing)

    async def _end_seen(self) -> None:
        ending = self._ending
        if ending is not None and ending is not asyncio.current_task():
            await ending


def _seen(future: asyncio.Future[Any]) -> None:
    """Its error was told with another's, and is no unheard one."""
    if not future.cancelled():
        future.exception()


def _in_thread(call: Callable[[], T], within_s: float) -> asyncio.Future[T]:
    """Its own thread, and no pool's: one that hangs in a collective must not hold up the end of the process. The
    future fails with PoolFailed."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: PoolFailed | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast("T", result))

    def run() -> None:
        outcome: tuple[T | None, PoolFailed | None]
        try:
            outcome = call(), None
        except Exception as err:
            outcome = None, PoolFailed(f"rank 0: {err}", out_of_memory=isinstance(err, MemoryError))
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            pass  # the loop has ended

    threading.Thread(target=run, name="rank-0", daemon=True).start()
    late = PoolFailed(f"rank 0 was not done within {within_s:g} s")
    timer = loop.call_later(within_s, settle, None, late)
    future.add_done_callback(lambda _: timer.cancel())
    return future
