"""What many lives of a group of ranks leave behind in their leader: descriptors, threads, memory, processes, files.

    python -m bench.tp.cycles [--bare 1000] [--grouped 30] [--world 2] [--backend shm]

A bare cycle is spawn, ping, shutdown; a grouped one has the rendezvous and a sum between. Figures are the leader's,
after a tenth of the cycles and after all of them; the leader is a Leader, as a host process has it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

from bench.measure import machine, scratch, table
from helexa.neuron.freed import give_back_freed
from helexa.neuron.tp.leader import NEURON, Group, Leader
from helexa.neuron.tp.pool import WorkerPool


def held(folder: Path) -> list[str]:
    give_back_freed()
    process = psutil.Process()
    return [
        str(len(os.listdir("/proc/self/fd"))),
        str(threading.active_count()),
        f"{process.memory_info().rss / 2**20:.1f}",
        str(len(process.children(recursive=True))),
        str(len(list(folder.iterdir()))),
    ]


def bare(world: int) -> None:
    async def cycle() -> None:
        async with await WorkerPool.spawn(NEURON, world, list(range(world))) as pool:
            await pool.ping_all()
            await pool.shutdown()

    asyncio.run(cycle())


def grouped(world: int, backend: str, folder: Path) -> None:
    Leader(Group(backend, folder, tuple(range(world)))).close()


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m bench.tp.cycles")
    args.add_argument("--bare", type=int, default=1000)
    args.add_argument("--grouped", type=int, default=30)
    args.add_argument("--world", type=int, default=2)
    args.add_argument("--backend", default="shm")
    given = args.parse_args()
    folder = scratch()
    rows = []
    kinds: list[tuple[str, int, Callable[[], None]]] = [
        ("bare", given.bare, lambda: bare(given.world)),
        (f"over {given.backend}", given.grouped, lambda: grouped(given.world, given.backend, folder)),
    ]
    for name, count, cycle in kinds:
        for n in range(1, count + 1):
            cycle()
            if n in (max(1, count // 10), count):
                gc.collect()
                rows.append([name, str(n), *held(folder)])
                print(*rows[-1], file=sys.stderr, flush=True)
    print(f"{machine()}; {given.world} ranks\n")
    table(["cycles", "after", "descriptors", "threads", "resident MiB", "children", "files"], rows)


if __name__ == "__main__":
    main()
