"""The leader's side of its ranks: starts them, asks them, and sees to it that none is left.

Owned by one loop. Ranks 1 to N-1 are processes; the leader itself is rank 0, and enters collectives from a thread of
its own, after every rank has been told to. Whatever goes wrong with one rank ends all of them: a group that lost one is
good for nothing, and a rank that waits in a collective cannot be asked to leave it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from signal import Signals
from typing import Any, Final, TypeVar, cast

from helexa.core import logs
from helexa.neuron.tp import rpc
from helexa.neuron.tp.collective import Collective, CollectiveFailed, open_collective
from helexa.neuron.tp.comm import Comm

_log = logs.get("neuron.tp")

PING_S: Final = 10.0  # a machine under load starts a process slowly; a well one answers within 0.2 s
INIT_S: Final = 120.0  # torch's import among it
CHECK_S: Final = 60.0
SHUTDOWN_S: Final = 5.0
REAP_S: Final = 5.0
LAST_WORDS_S: Final = 0.5  # for output that is still in the pipes of a process that ended
TAIL_LINES: Final = 5

T = TypeVar("T")
R = TypeVar("R", bound=rpc.Response)


class PoolFailed(Exception):
    """A rank could not be started, died, did not answer in time, or said no. str() names the rank and the reason."""


class Rank(asyncio.SubprocessProtocol):
    """One worker process, as the leader sees it."""

    def __init__(self, rank: int, device: int, failed: Callable[[str], None]) -> None:
        self.rank, self.device = rank, device
        self.gone = asyncio.Event()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._failed = failed
        self._transport = cast("asyncio.SubprocessTransport", None)
        self._lines = {1: rpc.Lines(), 2: rpc.Lines(limit=1 << 20)}
        self._waiting: dict[int, asyncio.Future[rpc.Response]] = {}
        self._ids = 0
        self._pipes_open = len(self._lines)
        self._leaving = False

    @property
    def pid(self) -> int:
        return self._transport.get_pid()

    async def start(self, program: Sequence[str], world_size: int) -> None:
        """Raises OSError."""
        command = [
            *(*program, "--worker", "--rank", str(self.rank), "--world-size", str(world_size)),
            *("--device", str(self.device), "--parent", str(os.getpid())),
        ]
        loop = asyncio.get_running_loop()
        # A session of its own: Ctrl-C on a terminal is for the daemon.
        await loop.subprocess_exec(lambda: self, *command, start_new_session=True)

    def send(self, request: rpc.Request) -> asyncio.Future[rpc.Response]:
        """Written when it returns. The future is the response, or PoolFailed where the rank ends before it."""
        self._ids += 1
        request.id = self._ids
        response: asyncio.Future[rpc.Response] = asyncio.get_running_loop().create_future()
        stdin = cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0))
        if self.gone.is_set() or stdin.is_closing():
            response.set_exception(PoolFailed(f"rank {self.rank} has ended{self._last_words()}"))
        else:
            self._waiting[request.id] = response
            stdin.write(rpc.line(request))
        return response

    async def receive(self, sent: asyncio.Future[rpc.Response], answer: type[R], within_s: float) -> R:
        """What `send` waits for. Raises PoolFailed, also where it is another response."""
        try:
            async with asyncio.timeout(within_s):
                response = await sent
        except TimeoutError:
            raise PoolFailed(f"rank {self.rank} gave no {_op_of(answer)} within {within_s:g} s") from None
        if isinstance(response, rpc.Error):
            raise PoolFailed(f"rank {self.rank}: {response.kind}: {response.message}")
        if not isinstance(response, answer):
            raise PoolFailed(f"rank {self.rank} answered with {response!r}, not {_op_of(answer)}")
        return response

    async def leave(self, within_s: float) -> None:
        """Asked to end, and ended, in time or by force."""
        self._leaving = True
        try:
            async with asyncio.timeout(within_s):
                await self.receive(self.send(rpc.Shutdown()), rpc.Bye, within_s)
                await self.gone.wait()
        except (PoolFailed, TimeoutError) as err:
            if not self.gone.is_set():
                _log.warning("a rank did not leave and is killed", rank=self.rank, pid=self.pid, reason=str(err))
        await self.kill()

    async def kill(self) -> None:
        self._leaving = True
        if self._transport is None:
            return  # it was never started
        if not self.gone.is_set():
            try:
                self._transport.kill()
            except ProcessLookupError:
                pass
            try:
                async with asyncio.timeout(REAP_S):
                    await self.gone.wait()
            except TimeoutError:
                _log.error("a rank cannot be killed: it is inside the kernel", rank=self.rank, pid=self.pid)
        self._transport.close()

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        for line in self._lines[fd].feed(data):
            if fd == 1:
                self._response(line)
            elif line is not None and (text := line.decode(errors="replace").rstrip()):
                self.tail.append(text[:500])
                _log.info(text, rank=self.rank, pid=self.pid)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd in self._lines:
            self._pipes_open -= 1
            if not self._pipes_open and self._transport.get_returncode() is not None:
                self._end()

    def process_exited(self) -> None:
        if self._pipes_open:  # its last frame may be on its way, unless a process that it left behind holds the pipes
            asyncio.get_running_loop().call_later(LAST_WORDS_S, self._end)
        else:
            self._end()

    # ours

    def _end(self) -> None:
        if self.gone.is_set():
            return
        self.gone.set()
        reason = f"rank {self.rank} ended ({self._how()}){self._last_words()}"
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(PoolFailed(reason))
        if not self._leaving:
            self._failed(reason)

    def _response(self, line: bytes | None) -> None:
        try:
            response = rpc.read_response(line if line is not None else b"")
        except ValueError as err:
            self._failed(f"rank {self.rank} sent what is no frame ({err}): {(line or b'')[:200]!r}")
            return
        waiting = self._waiting.pop(response.id, None) if response.id is not None else None
        if waiting is None:
            # An answer to a request that timed out, or to none: never the answer to the next one.
            _log.warning("a rank answered what nobody waits for", rank=self.rank, answer=repr(response)[:200])
        elif not waiting.done():
            waiting.set_result(response)

    def _how(self) -> str:
        code = self._transport.get_returncode() or 0
        return f"exit code {code}" if code >= 0 else Signals(-code).name

    def _last_words(self) -> str:
        return f"; its last lines: {' | '.join(self.tail)}" if self.tail else ""


class WorkerPool:
    """The ranks of one model. Use it as `async with await WorkerPool.spawn(...)`: nothing is left behind it.

    failed: set, with the reason, when a rank ends or sends nonsense; every rank is being killed by then
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.collective: Collective | None = None
        self._ranks: list[Rank] = []
        self._ending: asyncio.Task[None] | None = None
        self._ended = threading.Event()  # no group is to be entered any more; the leader's own thread looks at it

    @classmethod
    async def spawn(cls, program: Sequence[str], world_size: int, devices: Sequence[int]) -> WorkerPool:
        """Start ranks 1 to world_size - 1. program: what `neuron` is, e.g. ["neuron"]. devices: by rank, the leader's
        first. Called from the thread that lives as long as the pool: a rank dies with its spawning thread."""
        if len(devices) != world_size:
            raise ValueError(f"{world_size} ranks need {world_size} devices, not {len(devices)}")
        pool = cls(world_size)
        try:
            for rank in range(1, world_size):
                made = Rank(rank, devices[rank], pool._rank_failed)
                pool._ranks.append(made)
                await made.start(program, world_size)
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
        for rank, pong in zip(self._ranks, await self._all(rpc.Ping, rpc.Pong, within_s), strict=True):
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

        group, _ = await self._with_leader(enter, lambda: rpc.Init(comm_id=comm.id), rpc.InitOk, within_s)
        self.collective = group
        return group

    async def sanity_check(self, within_s: float = CHECK_S) -> None:
        """Sum a one of each rank; every rank must see them all."""
        collective = self.collective
        if collective is None:
            raise PoolFailed("the leader is in no group; init first")
        own, answers = await self._with_leader(
            collective.count_ranks, rpc.NcclSanityCheck, rpc.NcclSanityResult, within_s
        )
        seen = [own, *(answer.observed_sum for answer in answers)]
        if any(count != self.world_size for count in seen):
            raise await self._broken(f"of {self.world_size} ranks, ranks 0 to {self.world_size - 1} saw {seen}")

    async def shutdown(self, within_s: float = SHUTDOWN_S) -> None:
        """Every rank says bye and is reaped; one that does not is killed."""
        self._leave_group()
        await asyncio.gather(*(rank.leave(within_s) for rank in self._ranks))
        await self._end_seen()

    async def close(self) -> None:
        """Every rank is killed and reaped. Idempotent."""
        self._leave_group()
        await asyncio.gather(*(rank.kill() for rank in self._ranks))
        await self._end_seen()

    # inside

    async def _all(self, request: Callable[[], rpc.Request], answer: type[R], within_s: float) -> list[R]:
        """The same of each rank, at once. Raises PoolFailed with what went wrong; the ranks are gone then."""
        return await self._settle(self._send(request, answer, within_s))

    def _send(self, request: Callable[[], rpc.Request], answer: type[R], within_s: float) -> list[asyncio.Future[R]]:
        """Written to every rank when it returns."""
        sent = [(rank, rank.send(request())) for rank in self._ranks]
        return [asyncio.ensure_future(rank.receive(response, answer, within_s)) for rank, response in sent]

    async def _with_leader(
        self, enter: Callable[[], T], request: Callable[[], rpc.Request], answer: type[R], within_s: float
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
        reasons = [str(error) for future in asked if future.done() and (error := future.exception()) is not None]
        if reasons:
            broken = await self._broken("; ".join(reasons))
            for future in asked:
                future.add_done_callback(_seen)
            raise broken
        return [future.result() for future in asked]

    async def _broken(self, reason: str) -> PoolFailed:
        """A group with one bad rank has none: all are killed, undrained."""
        await self.close()
        return PoolFailed(reason)

    def _rank_failed(self, reason: str) -> None:
        if self.failed.done():
            return
        self.failed.set_result(reason)
        _log.error("a rank failed; the others are ended with it", reason=reason)
        self._leave_group()
        self._ending = asyncio.get_running_loop().create_task(self.close())

    def _leave_group(self) -> None:
        self._ended.set()
        collective, self.collective = self.collective, None
        if collective is not None:
            collective.abort()
            collective.close()

    async def _end_seen(self) -> None:
        ending = self._ending
        if ending is not None and ending is not asyncio.current_task():
            await ending


def _op_of(frame: type[rpc.Frame]) -> str:
    return str(frame.__struct_config__.tag)


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
            outcome = None, PoolFailed(f"rank 0: {err}")
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            pass  # the loop has ended

    threading.Thread(target=run, name="rank-0", daemon=True).start()
    late = PoolFailed(f"rank 0 was not done within {within_s:g} s")
    timer = loop.call_later(within_s, settle, None, late)
    future.add_done_callback(lambda _: timer.cancel())
    return future
