"""What one decision costs the gateway, and how that grows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, cast

from bench.measure import table
from helexa.cortex import placement, router
from helexa.cortex.eviction import POLICIES, Resident
from helexa.cortex.plans import DeviceView, Need, NodeView, Plan, Wanted
from helexa.cortex.simulate import svg
from helexa.cortex.simulate.world import Model, NodeSpec, SimModel, SimNode, SimReplica

NOW = 10_000.0
SIZES_MB = (1_000, 8_000, 30_000, 60_000)
COUNTS = (10, 30, 100, 300, 1000)


def show(plot: Path | None) -> None:
    _routing()
    grown = _plans()
    if plot is not None:
        drawn = [svg.Line(f"{mb:,} MB", [(float(n), ms) for n, ms in points]) for mb, points in grown.items()]
        plot.write_text(svg.page([svg.lines("A placement plan", "nodes", "ms", drawn, log_x=True, log_y=True)]))
        print(f"growth drawn in {plot}\n")


def full_fleet(nodes: int, seed: int = 1) -> list[NodeView]:
    """Full but for less than 2 GB a device, some three models on each, three in ten of them in use."""
    rng = Random(seed)
    found = []
    for at in range(nodes):
        devices: list[DeviceView] = []
        held: list[Resident] = []
        for index in range(rng.choice((1, 2))):
            total = left = rng.choice((12, 16, 24, 32, 48, 64)) * 1024
            while left >= 2048:
                mb = min(left, int(1024 * 48 ** rng.random()))
                left -= mb
                held.append(
                    Resident(
                        model=f"{at}/{len(held)}",
                        memory_mb={index: mb},
                        in_use=int(rng.random() < 0.3),
                        last_used=rng.uniform(0, 9_000),
                        uses=rng.uniform(1, 100),
                        uses_at=9_000.0,
                    )
                )
            devices.append(DeviceView(index=index, total_mb=total, free_mb=left))
        found.append(NodeView(name=f"n{at}", devices=devices, residents=held))
    return found


def _plans() -> dict[int, list[tuple[int, float]]]:
    rows = []
    grown: dict[int, list[tuple[int, float]]] = {mb: [] for mb in SIZES_MB}
    for count in COUNTS:
        nodes = full_fleet(count)
        for mb in SIZES_MB:
            wanted = Wanted("wanted", Need((mb,), "vram_mb"))

            def plan(nodes: list[NodeView] = nodes, wanted: Wanted = wanted) -> Any:
                return placement.plan(nodes, wanted, POLICIES["adaptive"], NOW)

            def every(nodes: list[NodeView] = nodes, wanted: Wanted = wanted) -> Any:
                return placement.weigh(nodes, wanted, POLICIES["adaptive"], NOW)

            found, best = plan(), every()[0]
            planned = isinstance(found, Plan)
            if isinstance(found, Plan):
                assert found.order == best.order, "the same answer as the exhaustive one"
            ms = 1000 * _seconds(plan, 21)
            grown[mb].append((count, ms))
            bound = " (< 5)" if count == 1000 else ""
            rows.append(
                [
                    str(count),
                    f"{mb:,}",
                    f"{ms:.2f}{bound}",
                    f"{1000 * _seconds(every, 5):.2f}",
                    str(found.weighed) if planned else "none fits",
                    str(len(found.victims)) if planned else "-",
                ]
            )
    print("A placement plan:\n")
    table(["nodes", "model MB", "ms", "every node: ms", "looked at closely", "victims"], rows)
    print()
    return grown


def _routing() -> None:
    rows = []
    for count in (1, 3, 8, 83, 500):
        model = Model("m", 1000)
        known = SimModel(model, model.wanted())
        known.live = [SimReplica(known, SimNode(NodeSpec(f"n{i}", (1000,), 1.0)), {0: 1000}) for i in range(count)]
        rng = Random(1)
        for replica in known.live:
            replica.inflight = rng.randrange(9)

        def choose(live: Any = known.live, rng: Random = rng) -> Any:
            return router.choose(cast("Any", live), (), rng)

        bound = {8: " (< 10)", 500: " (< 100)"}.get(count, "")
        rows.append([str(count), f"{1e6 * _seconds(choose, 21, 200):.1f}{bound}"])
    print("A choice among the replicas of one model:\n")
    table(["replicas", "us"], rows)
    print()


def _seconds(call: Callable[[], Any], times: int, inner: int = 1) -> float:
    """Median of CPU times: other work on the machine is not ours to measure."""
    taken = []
    for _ in range(times):
        begun = time.process_time()
        for _ in range(inner):
            call()
        taken.append((time.process_time() - begun) / inner)
    return statistics.median(taken)
