"""What one decision costs the gateway, and how that grows."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from msgspec.structs import replace

from bench.measure import table
from helexa.core import logs
from helexa.core.catalogue import Catalogue, ModelProfile
from helexa.core.config import CortexSettings, NeuronEntry
from helexa.core.discovery import NodeHealth
from helexa.core.lifecycle import ModelInfo, ModelLimits
from helexa.cortex import placement, prefixes, router
from helexa.cortex.eviction import POLICIES, Resident
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import Replica
from helexa.cortex.plans import DeviceView, Need, NodeView, NoPlan, Plan, Wanted
from helexa.cortex.prefixes import Prompt
from helexa.cortex.router import ModelRouter
from helexa.cortex.simulate import svg

NOW = 10_000.0
SIZES_MB = (1_000, 8_000, 30_000, 60_000)
COUNTS = (10, 30, 100, 300, 1000)
REPLICAS = (2, 3, 5, 8, 25, 83, 200, 500)


def show(plot: Path | None) -> None:
    chosen = _routing()
    _reading()
    grown = _plans()
    if plot is not None:
        drawn = [svg.Line(f"{mb:,} MB", [(float(n), ms) for n, ms in points]) for mb, points in grown.items()]
        lines = [svg.Line(name, points) for name, points in chosen.items()]
        charts = [
            svg.lines("A choice of replica", "replicas of the model", "us", lines, log_x=True, log_y=True),
            svg.lines("A placement plan", "nodes", "ms", drawn, log_x=True, log_y=True),
        ]
        plot.write_text(svg.page(charts))
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
            if isinstance(found, Plan):
                assert found.order == best.order, "the same answer as the exhaustive one"
            ms = 1000 * _seconds(plan, 21)
            grown[mb].append((count, ms))
            rows.append(_plan_row(count, f"{mb:,}", found, ms, 1000 * _seconds(every, 5)))
        rows.append(_no_room(count, nodes))
    print("A placement plan (reasons: what it takes to say why none fits, node by node, when somebody looks):\n")
    table(["nodes", "model MB", "ms", "reasons: ms", "every node: ms", "looked at closely", "victims"], rows)
    print()
    return grown


def _plan_row(count: int, mb: str, found: Plan | NoPlan, ms: float, every_ms: float) -> list[str]:
    bound = " (< 5)" if count == COUNTS[-1] else ""
    row = [str(count), mb, f"{ms:.2f}{bound}"]
    if isinstance(found, Plan):
        return [*row, "-", f"{every_ms:.2f}", str(found.weighed), str(len(found.victims))]
    begun = time.process_time()
    assert found.reasons
    return [*row, f"{1000 * (time.process_time() - begun):.2f}", f"{every_ms:.2f}", "none fits", "-"]


def _no_room(count: int, nodes: Sequence[NodeView]) -> list[str]:
    """The same fleet, all of it in use."""
    busy = [replace(n, residents=[replace(r, in_use=1) for r in n.residents]) for n in nodes]
    wanted = Wanted("wanted", Need((8_000,), "vram_mb"))

    def plan() -> Plan | NoPlan:
        return placement.plan(busy, wanted, POLICIES["adaptive"], NOW)

    def every() -> Any:
        return placement.weigh(busy, wanted, POLICIES["adaptive"], NOW)

    return _plan_row(count, "8,000, all in use", plan(), 1000 * _seconds(plan, 21), 1000 * _seconds(every, 5))


# Routing


class _Asked:
    t_first_token = 0.0


def _routing() -> dict[str, list[tuple[float, float]]]:
    """One model with so many replicas in a fleet of 1,000 nodes and 2,000 models. Each replica has seen some thirty
    conversations, of whose prompts every tenth waits still; the prompt that is asked for is known to one of them."""
    logs.configure(level="warning")  # a thousand nodes come up
    fleet = Fleet(
        CortexSettings(neurons=[NeuronEntry(name=f"n{i}", endpoint=f"http://n{i}.invalid:1") for i in range(1000)]),
        Catalogue(models=[ModelProfile(id=f"m{i}") for i in range(2000)]),
    )
    for at, node in enumerate(fleet.nodes.values()):
        held = [f"m{count}" for count in REPLICAS if at < count] + [f"m{1000 + at}"]
        limits = ModelLimits(context=32_768, slots=8)
        models = [ModelInfo(id=name, status="loaded", limits=limits) for name in held]
        fleet.saw_poll(node, models=models, health=NodeHealth(status="ok", uptime_secs=1, devices=[]), started=1.0)
    rows = []
    grown: dict[str, list[tuple[float, float]]] = {"with a prompt": [], "fewest in flight": []}
    for count in REPLICAS:
        name = f"m{count}"
        live, rng, model = fleet.replicas(name), Random(1), ModelRouter()
        assert len(live) == count
        for replica in live:
            replica.work.timed({"prompt_n": 8_000, "prompt_ms": 1_000})
        for at in range(30 * count):
            _one(model, live, prefixes.read(_body(at, rng.randrange(1, 20)), name), rng, done=at % 10 != 0)
        asked = prefixes.read(_body(7, 21), name)
        assert asked is not None

        def choose(name: str = name, model: ModelRouter = model, asked: Prompt = asked, rng: Random = rng) -> Any:
            return model.choose(fleet.replicas(name), (), asked, 1.0, rng)

        def fewest(name: str = name, rng: Random = rng) -> Any:
            return router.choose(fleet.replicas(name), (), rng)

        def all_of_it(name: str = name, model: ModelRouter = model, asked: Prompt = asked, rng: Random = rng) -> Any:
            _one(model, fleet.replicas(name), asked, rng, done=True)

        bound = " (< 10)" if count <= 8 else " (< 100)" if count == REPLICAS[-1] else ""
        figures = [1e6 * _seconds(call, 21, 200) for call in (fewest, choose, all_of_it)]
        grown["fewest in flight"].append((count, figures[0]))
        grown["with a prompt"].append((count, figures[1]))
        rows.append([str(count), f"{figures[0]:.1f}", f"{figures[1]:.1f}{bound}", f"{figures[2]:.1f}"])
    print("A choice among the replicas of one model, us (one replica: nothing is read, and the first column is all):\n")
    table(["replicas", "fewest in flight", "a prompt, hashes given", "and what is kept of it"], rows)
    print()
    return grown


def _one(model: ModelRouter, live: Sequence[Replica], prompt: Prompt | None, rng: Random, *, done: bool) -> None:
    """One request from its choice to its end."""
    assert prompt is not None
    choice = model.choose(live, (), prompt, 1.0, rng)
    assert choice is not None
    asked = _Asked()
    ticket = model.sent(choice, asked, 1.0, is_told=True)
    if done:
        asked.t_first_token = 1.0
        model.ended(ticket, 1.0, prompt_tokens=8_000, cached_tokens=4_000)


def _body(talk: int, turns: int, words: int = 72) -> bytes:
    """Some 380 tokens a message."""
    opening = {"role": "system", "content": "You are of great help. " * 20}
    said = [{"role": "user", "content": f"{talk} {turn} " + "the quick brown fox " * words} for turn in range(turns)]
    return json.dumps({"model": "m", "messages": [opening, *said], "stream": True}).encode()


def _reading() -> None:
    rows = []
    for turns, words in ((1, 40), (5, 72), (21, 72), (1, 1500), (85, 72)):
        body = _body(1, turns, words)
        found = prefixes.read(body, "m")
        assert found is not None

        def read(body: bytes = body) -> Any:
            return prefixes.read(body, "m")

        bound = " (< 40)" if 30_000 < len(body) < 35_000 else ""
        rows.append(
            [f"{len(body):,}", str(turns + 1), str(len(found.hashes)), f"{1e6 * _seconds(read, 21, 200):.1f}{bound}"]
        )
    print("A prompt read and hashed (8,000 tokens are some 32,000 bytes):\n")
    table(["bytes", "messages", "marks", "us"], rows)
    print()


def _seconds(call: Callable[[], Any], times: int, inner: int = 1) -> float:
    """Median of CPU times: other work on the machine is not ours to measure. What was made before is left alone by the
    collector, as the gateway's own start sees to it."""
    gc.collect()
    gc.freeze()
    taken = []
    for _ in range(times):
        begun = time.process_time()
        for _ in range(inner):
            call()
        taken.append((time.process_time() - begun) / inner)
    return statistics.median(taken)
