"""Where the time of a step goes when a model is split over CPU ranks: compute, sums, gather and control.

    python -m bench.tp.steps FOLDER [--rows 1,8] [--prefill 256] [--steps 40] [--rounds 5] [--splits ...]

FOLDER is a safetensors model. A split is RANKSxTHREADS with the back end behind it where there are several ranks. Each
round starts every split anew and takes turns; figures are rank 0's, a step: the median of all steps, and then the
fastest quarter of them (calm: what other work on the machine did not disturb) with its parts. `sums` is the time inside
all-reduces, in so many calls: the exchange, and waiting for the slower rank; `control` is what the other ranks are told
(encoding, writing), with the thread that reads their answers. The last column is the speed beside the first split's of
the same round, by the calm steps.
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
from typing import Any

import msgspec

from bench.measure import machine, scratch, spread, table
from bench.tp.clocked import clocked
from helexa.neuron.harness.torch.ranks import load_ranked
from helexa.neuron.harness.torch.step import Row, Step
from helexa.neuron.tp.holder import LOADER
from helexa.neuron.tp.leader import Group

SPLITS = "1x2,2x1:shm,2x1:gloo"


class Clock:
    """Of one runner: how long its steps took, all in all and in its own shard."""

    def __init__(self, runner: Any, shard: Any) -> None:
        self._runner = runner
        self._step = shard.step
        shard.step = self._own
        self.own_s = 0.0

    def _own(self, step: Step) -> Any:
        began = time.perf_counter()
        out = self._step(step)
        self.own_s += time.perf_counter() - began
        return out

    def run(self, steps: list[Step]) -> dict[str, float]:
        """Milliseconds a step: the median of all, and the parts of the fastest quarter, which nothing disturbed."""
        each = sorted((self._one(step) for step in steps), key=lambda parts: parts["quiet"])
        calm = each[: max(1, len(each) // 4)]
        out = {name: sum(parts[name] for parts in calm) / len(calm) for name in each[0]}
        return out | {"step": statistics.median(parts["quiet"] for parts in each)}

    def _one(self, step: Step) -> dict[str, float]:
        self.own_s = 0.0
        for group in clocked:
            group.sums_s = group.gather_s = 0.0
            group.calls = 0
        began = time.perf_counter()
        self._runner.step(step)
        total = time.perf_counter() - began
        sums = sum(group.sums_s for group in clocked)
        gather = sum(group.gather_s for group in clocked)
        parts = {
            "quiet": total,
            "compute": self.own_s - sums - gather,
            "sums": sums,
            "gather": gather,
            "control": total - self.own_s,
        }
        return {name: s * 1e3 for name, s in parts.items()} | {"calls": sum(group.calls for group in clocked)}


def measure(split: str, folder: Path, scratch_folder: Path, given: argparse.Namespace) -> None:
    """In a process of its own: prints what each kind of step took."""
    shape, _, backend = split.partition(":")
    world, threads = (int(part) for part in shape.split("x"))
    from helexa.neuron.harness.torch.families import read_config
    from helexa.neuron.harness.torch.shard import LocalRunner, ShardSpec, load_shard
    from helexa.neuron.tp.partition import partition

    shares = list(partition(read_config(folder).shape, world, given.shares if world > 1 else None))
    specs = [ShardSpec(str(folder), rank, world, shares, given.dtype, "cpu", threads) for rank in range(world)]
    runner: Any
    if world == 1:
        runner = LocalRunner(load_shard(specs[0], None))
        shard = runner.shard
    else:
        loader = "bench.tp.clocked:load" if given.clocked else LOADER
        group = Group(backend, scratch_folder, tuple(range(world)), loader=loader)
        told = [msgspec.to_builtins(spec) for spec in specs]
        runner = load_ranked(told, group, progress=lambda _: None, on_failed=lambda reason: None)
        shard = runner._shard
    clock = Clock(runner, shard)
    prompt = [(7 * n) % 1000 + 100 for n in range(given.prefill)]
    out: dict[str, dict[str, float]] = {}
    runner.step(Step(rows=[Row(0, 0, prompt)]))
    out["prefill"] = clock.run([Step(rows=[Row(0, 0, prompt)]) for _ in range(4)])
    for rows in given.rows:
        runner.step(Step(rows=[Row(row, 0, prompt[:64]) for row in range(rows)]))
        steps = [Step(rows=[Row(row, 64 + n, [500 + n]) for row in range(rows)]) for n in range(given.steps + 3)]
        clock.run(steps[:3])
        out[f"decode x{rows}"] = clock.run(steps[3:])
    runner.close()
    print(json.dumps(out))


def one_round(split: str, folder: Path, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "bench.tp.steps", *sys.argv[1:], "--measure", split]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise SystemExit(f"{split}: {done.stderr[-3000:]}")
    out: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return out


def links(text: str) -> list[tuple[str, float, float]]:
    parts = [part.split(":") for part in text.split(",")]
    return [(name, float(us), float(gb_a_s)) for name, us, gb_a_s in parts]


def predict(splits: list[str], seen: dict[tuple[str, str, str], list[float]], given: argparse.Namespace) -> None:
    """The same compute and control with another link between the ranks: a sum of b bytes takes its latency and
    2 (N - 1) / N b over its bandwidth (a ring), the gather each other rank's part of the vocabulary over it."""
    from helexa.neuron.harness.torch.families import read_config

    config = read_config(given.folder)
    rows = []
    for split in splits:
        world = int(split.split("x")[0])
        if world == 1:
            continue
        for kind in ["prefill", *(f"decode x{n}" for n in given.rows)]:
            tokens = given.prefill if kind == "prefill" else int(kind.split("x")[1])
            answers = 1 if kind == "prefill" else tokens
            own = {
                part: statistics.median(seen[kind, split, part]) for part in ("compute", "control", "calls", "quiet")
            }
            sum_bytes = tokens * config.hidden * 4
            gather_bytes = answers * config.vocabulary * 4 * (world - 1) / world
            for name, us, gb_a_s in given.links:
                a_sum_ms = us / 1e3 + 2 * (world - 1) / world * sum_bytes / gb_a_s / 1e6
                gather_ms = us / 1e3 + gather_bytes / gb_a_s / 1e6
                ms = own["compute"] + own["control"] + own["calls"] * a_sum_ms + gather_ms
                rows.append([kind, split, name, f"{ms:.1f}", f"{100 * (1 - own['compute'] / ms):.1f} %"])
    table(["step", "ranks x threads", "link", "ms", "of it not compute"], rows)


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m bench.tp.steps")
    args.add_argument("folder", type=Path)
    args.add_argument("--splits", default=SPLITS)
    args.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    args.add_argument("--prefill", type=int, default=256, help="tokens of a prompt")
    args.add_argument("--steps", type=int, default=40)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--dtype", default="f32")
    args.add_argument(
        "--shares", type=lambda text: [float(n) for n in text.split(",")], help="by rank; left out: equal"
    )
    args.add_argument("--no-clock", dest="clocked", action="store_false", help="do not clock the collectives")
    args.add_argument("--links", type=links, default=[], help="NAME:MICROSECONDS:GB_A_SECOND,...: what they would give")
    args.add_argument("--measure", help=argparse.SUPPRESS)
    given = args.parse_args()
    if given.measure:
        measure(given.measure, given.folder, scratch(), given)
        return
    splits = given.splits.split(",")
    seen: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _ in range(given.rounds):
        for split in splits:
            for kind, parts in one_round(split, given.folder, given).items():
                for part, ms in parts.items():
                    seen[kind, split, part].append(ms)
    print(f"{machine()}\ntorch {version('torch')}, {given.dtype}; {given.rounds} rounds by turns, medians\n")
    rows: list[list[str]] = []
    for kind in ["prefill", *(f"decode x{n}" for n in given.rows)]:
        for split in splits:
            cells = [statistics.median(seen[kind, split, part]) for part in ("compute", "sums", "gather", "control")]
            calls = statistics.median(seen[kind, split, "calls"])
            both = zip(seen[kind, splits[0], "quiet"], seen[kind, split, "quiet"], strict=True)
            ratio = spread([one / other for one, other in both], 2)
            times = [spread(seen[kind, split, name]) for name in ("step", "quiet")]
            rows.append([kind, split, *times, *(f"{ms:.2f}" for ms in cells), f"{calls:.0f}", ratio])
    head = ["step", "ranks x threads", "ms, all", "ms, calm", "compute", "sums", "gather", "control", "calls", "speed"]
    table(head, rows)
    if given.links:
        print()
        predict(splits, seen, given)


if __name__ == "__main__":
    main()
