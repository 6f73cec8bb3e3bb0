"""What one all-reduce between CPU ranks costs: the shared mapping beside Gloo.

    python -m bench.tp [--ranks 2,3] [--sizes 576,4096,65536] [--calls 2000] [--rounds 5]

Every rank is a process of its own with one thread. Rounds of the backends take turns; the figure is rank 0's time a
call, and ranks do nothing between calls, so that it is the exchange alone, not a model's step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from bench.measure import machine, scratch, spread, table
from helexa.neuron.tp.comm import Comm, read
from helexa.neuron.tp.rendezvous import open_collective


def rank_main(comm_id: str, rank: int, world: int, sizes: list[int], calls: int) -> None:
    import torch

    torch.set_num_threads(1)
    group = open_collective(read(comm_id), rank, world, rank)
    took = {}
    for size in sizes:
        tensor = torch.ones(size)
        for _ in range(calls // 10):
            group.all_reduce(tensor)
        tensor.fill_(0.0)
        began = time.perf_counter()
        for _ in range(calls):
            group.all_reduce(tensor)
        took[size] = (time.perf_counter() - began) / calls * 1e6
    group.barrier()
    group.close()
    if rank == 0:
        print(json.dumps(took))


def one_round(backend: str, world: int, folder: Path, given: argparse.Namespace) -> dict[int, float]:
    """Microseconds a call, by size."""
    comm = Comm.new(backend, folder)
    sizes, calls = ",".join(map(str, given.sizes)), given.calls if backend == "shm" else given.calls // 10
    command = [sys.executable, "-m", "bench.tp", "--sizes", sizes, "--calls", str(calls), "--rank"]
    with (folder / "log").open("ab") as log:
        ranks = [
            subprocess.Popen([*command, f"{comm.id},{rank},{world}"], stdout=subprocess.PIPE, stderr=log)
            for rank in range(world)
        ]
    out = [rank.communicate(timeout=300)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{backend}, {world} ranks: a rank failed:\n{(folder / 'log').read_text()[-3000:]}")
    return {int(size): us for size, us in json.loads(out[0].splitlines()[-1]).items()}


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m bench.tp")
    args.add_argument("--ranks", type=integers, default=[2])
    args.add_argument("--sizes", type=integers, default=[576, 4096, 65536], help="floats in a tensor")
    args.add_argument("--calls", type=int, default=2000)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--rank", help=argparse.SUPPRESS)
    given = args.parse_args()
    if given.rank:
        comm_id, rank, world = given.rank.split(",")
        rank_main(comm_id, int(rank), int(world), given.sizes, given.calls)
        return
    folder = scratch()
    seen: dict[tuple[int, int, str], list[float]] = defaultdict(list)
    for _ in range(given.rounds):
        for world in given.ranks:
            for backend in ("shm", "gloo"):
                for size, us in one_round(backend, world, folder, given).items():
                    seen[world, size, backend].append(us)
    print(f"{machine()}\ntorch {version('torch')}; {given.rounds} rounds by turns, median (least to greatest)\n")
    rows = []
    for world in given.ranks:
        for size in given.sizes:
            shm, gloo = seen[world, size, "shm"], seen[world, size, "gloo"]
            ratio = statistics.median(gloo) / statistics.median(shm)
            rows.append([str(world), str(size), spread(shm), spread(gloo), f"{ratio:.0f}"])
    table(["ranks", "floats", "shm, µs", "gloo, µs", "gloo to shm"], rows)


if __name__ == "__main__":
    main()
