"""Pools of real ranks: they come together, and whatever happens to one of them, none is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from tests.helpers.aio import run
from tests.helpers.raw import until

from helexa.neuron.tp import rpc
from helexa.neuron.tp.comm import Comm
from helexa.neuron.tp.pool import PoolFailed, WorkerPool

NEURON = [sys.executable, "-P", "-m", "helexa.neuron"]
needs_torch = pytest.mark.skipif(
    find_spec("torch") is None, reason="torch is not installed: pip install 'helexa[torch]'"
)


@asynccontextmanager
async def pool_of(world_size: int, program: list[str] = NEURON) -> AsyncIterator[WorkerPool]:
    pool = await WorkerPool.spawn(program, world_size, list(range(world_size)))
    pids = pool.pids
    try:
        yield pool
    finally:
        await pool.close()
    assert not [pid for pid in pids if psutil.pid_exists(pid)], "a rank was left behind"


@needs_torch
@pytest.mark.parametrize(("world_size", "backend"), [(2, "shm"), (3, "shm"), (4, "shm"), (2, "gloo"), (3, "gloo")])
def test_a_group_comes_together_counts_itself_and_leaves(tmp_path: Path, world_size: int, backend: str) -> None:
    async def main() -> None:
        async with pool_of(world_size) as pool:
            await pool.ping_all()
            await pool.init(Comm.new(backend, tmp_path))
            await pool.sanity_check()
            await pool.shutdown()
            assert not pool.failed.done(), "a rank that was asked to leave has not failed"

    run(main(), timeout_s=60)


def test_ranks_ping_and_leave_without_a_group_and_leave_nothing() -> None:
    async def main() -> None:
        before = 0
        for n in range(15):
            async with pool_of(3) as pool:
                await pool.ping_all()
                await pool.shutdown()
            if n == 0:
                before = _open_descriptors()  # the loop's own, for its first child, are open by then
        await until(lambda: _open_descriptors() <= before)

    run(main(), timeout_s=60)


def test_a_rank_that_is_killed_before_the_group_ends_the_others_with_its_reason() -> None:
    async def main() -> None:
        async with pool_of(3) as pool:
            await pool.ping_all()
            os.kill(pool.pids[0], signal.SIGKILL)
            assert "rank 1 ended (SIGKILL)" in await pool.failed
            await until(lambda: not any(psutil.pid_exists(pid) for pid in pool.pids))
            with pytest.raises(PoolFailed, match="rank 1 has ended"):
                await pool.ping_all()

    run(main())


@needs_torch
@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_a_rank_that_dies_inside_the_rendezvous_ends_it_for_all(tmp_path: Path, backend: str) -> None:
    # Rank 2 dies when it is told to come; ranks 0 and 1 are waiting for it in the group by then.
    code = (
        "import os, sys\n"
        "from helexa.neuron.tp import worker\n"
        "init = worker.Worker._init\n"
        "worker.Worker._init = lambda self, c: os._exit(3) if self.rank == 2 else init(self, c)\n"
        "sys.exit(worker.main())\n"
    )
    dies = [sys.executable, "-c", code]

    async def main() -> None:
        before = leaders_threads()
        async with pool_of(3, dies) as pool:
            with pytest.raises(PoolFailed, match=r"rank 2 ended \(exit code 3\)"):
                await pool.init(Comm.new(backend, tmp_path))
            assert not any(psutil.pid_exists(pid) for pid in pool.pids)
            if backend == "shm":  # torch cannot wake a thread that waits in Gloo; it ends at the init's deadline
                await until(lambda: leaders_threads() <= before)

    run(main(), timeout_s=60)


@needs_torch
def test_a_rank_that_says_no_ends_the_wait_of_those_that_came(tmp_path: Path) -> None:
    # Rank 2 refuses; rank 1 and the leader would wait for it to the deadline.
    code = (
        "import sys\n"
        "from helexa.neuron.tp import rpc, worker\n"
        "init = worker.Worker._init\n"
        "no = rpc.Error(kind='device', message='out of memory')\n"
        "worker.Worker._init = lambda self, c: no if self.rank == 2 else init(self, c)\n"
        "sys.exit(worker.main())\n"
    )

    async def main() -> None:
        before = leaders_threads()
        async with pool_of(3, [sys.executable, "-c", code]) as pool:
            with pytest.raises(PoolFailed) as failed:
                await pool.init(Comm.new("shm", tmp_path), within_s=100)
            assert str(failed.value) == "rank 2: device: out of memory", (
                "what the end of the others looks like is no reason"
            )
            await until(lambda: leaders_threads() <= before)

    run(main(), timeout_s=60)


def test_every_rank_has_its_frame_before_the_leader_enters(tmp_path: Path) -> None:
    async def main() -> None:
        async with pool_of(3) as pool:
            await pool.ping_all()
            written = []
            for rank in pool._ranks:
                rank.send = lambda n, request, rank=rank, send=rank.send: (written.append(rank.rank), send(n, request))[
                    1
                ]  # type: ignore[method-assign]

            def enter() -> list[int]:
                return list(written)

            seen, pongs = await pool._with_leader(enter, lambda _: rpc.Ping(), rpc.Pong, 10)
            assert seen == [1, 2]
            assert [pong.rank for pong in pongs] == [1, 2]

    run(main())


@needs_torch
def test_a_rank_that_is_killed_in_a_group_ends_the_leaders_wait_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with pool_of(2) as pool:
            group = await pool.init(Comm.new("shm", tmp_path))
            waiting = asyncio.get_running_loop().run_in_executor(None, group.barrier)
            os.kill(pool.pids[0], signal.SIGKILL)
            with pytest.raises(Exception, match="rank 0"):
                await waiting
            assert "rank 1 ended" in await pool.failed

    run(main())


def test_a_rank_that_does_not_answer_is_named_and_all_are_ended() -> None:
    async def main() -> None:
        async with pool_of(3) as pool:
            await pool.ping_all()
            os.kill(pool.pids[1], signal.SIGSTOP)
            with pytest.raises(PoolFailed, match=r"rank 2 gave no pong within 0\.3 s"):
                await pool.ping_all(within_s=0.3)
            assert not any(psutil.pid_exists(pid) for pid in pool.pids)

    run(main())


def test_a_rank_that_hangs_in_shutdown_is_killed_within_the_bound() -> None:
    async def main() -> None:
        async with pool_of(2) as pool:
            await pool.ping_all()
            os.kill(pool.pids[0], signal.SIGSTOP)
            async with asyncio.timeout(10):
                await pool.shutdown(within_s=0.3)
            assert not psutil.pid_exists(pool.pids[0])

    run(main())


def test_ranks_that_answer_for_another_place_are_not_believed() -> None:
    code = (
        "import sys\n"
        "from helexa.neuron.tp import worker\n"
        "sys.argv[sys.argv.index('--device') + 1] = '7'\n"
        "sys.exit(worker.main())\n"
    )
    wrong = [sys.executable, "-c", code]

    async def main() -> None:
        async with pool_of(2, wrong) as pool:
            with pytest.raises(PoolFailed, match="rank 1 of 2 on device 1 answers as rank 1 of 2 on device 7"):
                await pool.ping_all()

    run(main())


def test_a_program_that_is_not_there_is_named() -> None:
    async def main() -> None:
        with pytest.raises(PoolFailed, match="no-such-neuron"):
            await WorkerPool.spawn(["/no-such-neuron"], 2, [0, 1])

    run(main())


def test_a_leader_that_is_killed_leaves_no_rank() -> None:
    leader = (
        "import asyncio, sys\n"
        "from helexa.neuron.tp.pool import WorkerPool\n"
        "async def main():\n"
        "    pool = await WorkerPool.spawn([sys.executable, '-P', '-m', 'helexa.neuron'], 3, [0, 1, 2])\n"
        "    await pool.ping_all()\n"
        "    print(*pool.pids, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )

    async def none_left(pids: list[int]) -> None:
        await until(lambda: not any(psutil.pid_exists(pid) for pid in pids))

    with subprocess.Popen([sys.executable, "-c", leader], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    run(none_left(pids))


def leaders_threads() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate() if thread.name == "rank-0"}


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
