"""How well models are placed and evicted and requests routed, and what that costs:
`python -m bench.fleet [policies|turns|routing|cost|race|all]`.

Everything but the times of `cost` and the whole of `race` (real programs; no part of `all`) comes from the simulator
(src/helexa/cortex/simulate), which runs the gateway's own placement, eviction, router and swapper. Rules were tuned on
other seeds (from 1001) than the default ones here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import mean

from bench.fleet import cost, race, routing
from bench.fleet.intervals import ratio
from bench.measure import machine, table
from helexa.cortex.eviction import POLICIES
from helexa.cortex.simulate.results import Results
from helexa.cortex.simulate.rivals import best_fit, clairvoyant
from helexa.cortex.simulate.simulation import Rules, Simulation
from helexa.cortex.simulate.trace import Request
from helexa.cortex.simulate.workloads import GB, Arrivals, W, Workload, drawn_models, drawn_nodes, generate, standard
from helexa.cortex.simulate.world import Model, NodeSpec

TARGETS = {  # cold starts against LRU, against the clairvoyant heuristic; mean wait against LRU
    "W1": (0.93, 1.30, 1.03),
    "W2": (1.00, 1.30, 1.03),
    "W3": (0.88, 1.70, 1.03),
    "W4": (1.00, 1.55, 1.03),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet", description=__doc__)
    parser.add_argument(
        "what", nargs="?", default="all", choices=["policies", "turns", "routing", "cost", "race", "all"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--workloads", nargs="+", default=list(W), choices=list(W))
    parser.add_argument("--loads", type=int, default=500, help="how many loads `race` makes at least")
    parser.add_argument("--plot", type=Path, help="where the growth of the costs is drawn (SVG)")
    args = parser.parse_args()
    print(f"{machine()}; seeds {' '.join(map(str, args.seeds))}\n")
    if args.what in ("policies", "all"):
        policies(args.workloads, args.seeds)
    if args.what in ("turns", "all"):
        turns()
    if args.what in ("routing", "all"):
        routing.show(args.seeds)
    if args.what in ("cost", "all"):
        cost.show(args.plot)
        day(args.seeds[0])
    if args.what == "race":
        race.show(args.loads, args.seeds[0])


def policies(workloads: Sequence[str], seeds: Sequence[int]) -> None:
    """1. Cold starts and waiting against LRU, against the clairvoyant heuristic, and against another placement."""
    against, absolute = [], []
    for name in workloads:
        runs: dict[str, list[Results]] = {"lru": [], "adaptive": [], "clairvoyant": [], "best fit": []}
        for seed in seeds:
            load = standard(name, seed)
            for rules in (
                Rules("lru", POLICIES["lru"]),
                Rules("adaptive", POLICIES["adaptive"]),
                Rules("clairvoyant", clairvoyant(load.requests)),
                Rules("best fit", POLICIES["adaptive"], place=best_fit),
            ):
                runs[rules.name].append(run(load, rules))
        ours = runs["adaptive"]
        lru, known, wait = TARGETS[name]
        against.append(
            [
                name,
                f"{ratio(ours, runs['lru'], cold)} (<= {lru})",
                f"{ratio(ours, runs['clairvoyant'], cold)} (<= {known})",
                f"{ratio(ours, runs['lru'], lambda r: r.mean_wait_s)} (<= {wait})",
                ratio(ours, runs["lru"], lambda r: r.load_seconds),
                ratio(ours, runs["best fit"], loads) + (" (<= 0.5)" if name in ("W3", "W4") else ""),
            ]
        )
        for rule, found in runs.items():
            absolute.append(
                [
                    name,
                    rule,
                    *(
                        f"{mean(map(figure, found)):,.{digits}f}"
                        for figure, digits in (
                            (cold, 0),
                            (lambda r: r.copies, 0),
                            (lambda r: r.evictions, 0),
                            (lambda r: r.load_seconds, 0),
                            (lambda r: r.mean_wait_s, 2),
                            (lambda r: r.wait_s(0.5), 2),
                            (lambda r: r.wait_s(0.99), 1),
                            (lambda r: r.refused, 0),
                            (lambda r: 100 * sum(n.mean_mb for n in r.nodes) / sum(n.total_mb for n in r.nodes), 0),
                        )
                    ),
                ]
            )
    print("Ratios: mean over the seeds, with its 95 % interval. Placement is the same but in the last column.\n")
    table(
        ["", "cold starts / LRU", "/ clairvoyant", "mean wait / LRU", "load seconds / LRU", "loads / best fit's"],
        against,
    )
    print("\nMeans over the seeds.\n")
    head = [
        "",
        "rule",
        "cold starts",
        "copies",
        "evictions",
        "load s",
        "wait mean",
        "p50",
        "p99",
        "refused",
        "memory %",
    ]
    table(head, absolute)
    print()


def cold(results: Results) -> float:
    return results.cold_starts


def loads(results: Results) -> float:
    return results.cold_starts + results.copies


def run(load: Workload, rules: Rules) -> Results:
    return Simulation(load.nodes, load.models, load.requests, rules).run()


def turns() -> None:
    """2. Two models by turns, 1 s apart, of which one fits; 12 s of load. In order, each request would be a load."""
    count = 400
    models = [Model(name, 10 * GB, service_s=0.2) for name in "ab"]
    requests = [Request(float(i), "ab"[i % 2], 100, 100) for i in range(count)]
    found = Simulation([NodeSpec("n", (10 * GB,), 1.0 * GB)], models, requests, Rules("adaptive")).run()
    print(f"Two models by turns, one fits, {count} requests 1 s apart, 12 s of load:\n")
    table(
        ["", "loads", "wait mean", "p50", "p99", "refused"],
        [
            ["in order", str(count), "-", "-", "-", "-"],
            [
                "ours",
                f"{found.cold_starts} (<= {count // 4})",
                f"{found.mean_wait_s:.1f} (<= 25)",
                f"{found.wait_s(0.5):.1f}",
                f"{found.wait_s(0.99):.1f}",
                str(found.refused),
            ],
        ],
    )
    print()


def day(seed: int) -> None:
    rng = Random(f"day/{seed}")
    nodes, models = drawn_nodes(50, rng), drawn_models(200, rng)
    rows = []
    for name, arrivals in (
        ("independent", Arrivals(10.0, 864_000)),
        ("bursts", Arrivals(10.0, 864_000, zipf=0.8, bursts=True)),
    ):
        load = Workload(name, nodes, models, generate([m.id for m in models], arrivals, rng))
        wall, cpu = time.perf_counter(), time.process_time()
        found = run(load, Rules("adaptive"))
        took, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rows.append([name, f"{len(load.requests):,}", f"{took:.1f} (<= 60)", f"{cpu:.1f}", f"{found.cold_starts:,}"])
    print("A day of 10 requests/s over 50 nodes and 200 models:\n")
    table(["arrivals", "requests", "seconds", "CPU s", "cold starts"], rows)
    print()


if __name__ == "__main__":
    main()
