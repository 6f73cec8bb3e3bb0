"""`cortex simulate`: what a trace, or a generated load, would meet on this fleet, and on a larger one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from helexa.core.aliases import Aliases
from helexa.core.catalogue import Catalogue
from helexa.core.config import CortexSettings
from helexa.cortex.client import CommandFailed
from helexa.cortex.eviction import POLICIES
from helexa.cortex.operate import print_json
from helexa.cortex.simulate import bound, svg, trace
from helexa.cortex.simulate.described import fleet, parse_node
from helexa.cortex.simulate.results import Results
from helexa.cortex.simulate.rivals import best_fit, clairvoyant
from helexa.cortex.simulate.simulation import Rules, Simulation
from helexa.cortex.simulate.trace import Request
from helexa.cortex.simulate.workloads import Arrivals, generate
from helexa.cortex.simulate.world import Model, NodeSpec

BOUND: Final = "least in order"
BOUNDED: Final = 50_000  # requests; some ten seconds


@dataclass(frozen=True, slots=True)
class Load:
    """A trace, or a load to generate: requests a second over so many hours."""

    path: Path | None = None
    rate: float = 0.2
    hours: float = 24.0
    zipf: float = 1.0
    bursts: bool = False
    seed: int = 1


def simulate(
    settings: CortexSettings,
    catalogue: Catalogue,
    load: Load,
    *,
    described: Sequence[str] = (),
    added: Sequence[str] = (),
    compare: bool = False,
    picture: Path | None = None,
    as_json: bool = False,
) -> None:
    """Prints a row for the fleet as it is and for each node that is added to it (one after the other, all kept).

    compare: the other policies beside it. Raises CommandFailed with what is wrong in the call or not known.
    """
    given = [parse_node(text, at) for at, text in enumerate(described, 1)]
    nodes, models = asyncio.run(fleet(settings, catalogue, given))
    if not nodes:
        raise CommandFailed("there is no node: name them under [[neurons]] in cortex.toml, or with --node 24GB", 2)
    if not models:
        raise CommandFailed("there is no model: name them in models.toml", 2)
    requests = _requests(load, catalogue, models)
    fleets: list[tuple[str, list[NodeSpec]]] = [("as it is", nodes)]
    for at, text in enumerate(added, 1):
        node = parse_node(text, at)
        if any(n.name == node.name for n in fleets[-1][1]):
            raise CommandFailed(f'--add-node "{text}": there is a node {node.name} already', 2)
        fleets.append((f"+ {text}", [*fleets[-1][1], node]))
    strategy = settings.eviction.strategy
    runs = [
        Simulation(
            specs, models, requests, Rules(f"{name}, {rules.name}" if compare else name, rules.policy, rules.place)
        ).run()
        for name, specs in fleets
        for rules in (_compared(strategy, requests) if compare else [Rules(strategy, POLICIES[strategy])])
    ]
    least = _bounds(fleets, models, requests) if compare else {}
    if picture is not None:
        picture.write_text(draw(runs))
    if as_json:
        bounds = [{"name": name, "cold_starts": round(loads, 6), "is_bound": True} for name, loads in least.items()]
        print_json([*(as_dict(found) for found in runs), *bounds])
    else:
        show(runs, least)
        if picture is not None:
            print(f"drawn in {picture}", file=sys.stderr)


def _compared(strategy: str, requests: Sequence[Request]) -> list[Rules]:
    names = [strategy, *(name for name in ("lru", "adaptive") if name != strategy)]
    return [
        *(Rules(name, POLICIES[name]) for name in names),
        Rules(f"{strategy}, best fit", POLICIES[strategy], place=best_fit),
        Rules("clairvoyant", clairvoyant(requests)),
    ]


def _bounds(
    fleets: Sequence[tuple[str, Sequence[NodeSpec]]], models: Sequence[Model], requests: Sequence[Request]
) -> dict[str, float]:
    """By fleet, the least loads that any rule could make. Where that cannot be worked out, stderr is told why."""
    if len(requests) > BOUNDED:
        print(f"cortex: no bound: it is worked out for up to {BOUNDED:,} requests", file=sys.stderr)
        return {}
    asked, mb = [request.model for request in requests], {model.id: model.mb for model in models}
    try:
        return {
            f"{name}, {BOUND}": bound.least_loads(asked, mb, sum(sum(node.devices_mb) for node in nodes))
            for name, nodes in fleets
        }
    except bound.NoSolver as err:
        print(f"cortex: no bound: {err}", file=sys.stderr)
        return {}


def _requests(load: Load, catalogue: Catalogue, models: Sequence[Model]) -> list[Request]:
    if load.path is None:
        arrivals = Arrivals(load.rate, max(1, round(load.rate * load.hours * 3600)), load.zipf, load.bursts)
        return generate([m.id for m in models], arrivals, Random(load.seed))
    try:
        requests = trace.read(load.path)
    except (OSError, trace.BadTrace) as err:
        raise CommandFailed(str(err), 2) from err
    known = {m.id for m in models}
    aliases = Aliases(catalogue.aliases)
    resolved = [
        Request(r.t, aliases.first(r.model, known), r.prompt_tokens, r.output_tokens, r.prefix) for r in requests
    ]
    strangers = sorted({r.model for r in resolved} - known)
    if strangers:
        shown = ", ".join(strangers[:5]) + (" ..." if len(strangers) > 5 else "")
        raise CommandFailed(f"{load.path} asks for models that models.toml does not name: {shown}", 2)
    if not resolved:
        raise CommandFailed(f"{load.path} has no requests", 2)
    return resolved


# Showing


def show(runs: Sequence[Results], least: Mapping[str, float]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)  # a pipe gets whole lines
    table = Table(box=None, header_style="bold")
    for at, head in enumerate(
        (
            "fleet",
            "cold starts",
            "waited for one",
            "wait mean",
            "p50",
            "p99",
            "evictions",
            "load s",
            "refused",
            "cached",
            "tok/s",
        )
    ):
        table.add_column(head, justify="right" if at else "left", no_wrap=at > 0)
    for r in runs:
        table.add_row(
            r.name,
            f"{r.cold_starts:,}",
            f"{r.cold_requests / r.requests:.1%}",
            f"{r.mean_wait_s:.2f} s",
            f"{r.wait_s(0.5):.2f} s",
            f"{r.wait_s(0.99):.1f} s",
            f"{r.evictions:,}",
            f"{r.load_seconds:,.0f}",
            f"{r.refused:,}",
            f"{r.cached:.0%}",
            f"{r.tokens_per_second:.1f}",
        )
    for name, loads in least.items():
        table.add_row(name, f"{loads:,.1f}", style="dim")
    console.print(table)
    if least:
        console.print(f"{BOUND}: of all memory as one pool; who lets requests wait may have fewer", style="dim")
    console.print()
    memory = Table(box=None, header_style="bold")
    memory.add_column("memory used (most)")
    for r in runs:
        memory.add_column(r.name, justify="right")
    names = dict.fromkeys(node.name for r in runs for node in r.nodes)
    used = [{n.name: f"{n.mean_mb / n.total_mb:.0%} ({n.peak_mb / n.total_mb:.0%})" for n in r.nodes} for r in runs]
    for name in names:
        memory.add_row(name, *(of.get(name, "") for of in used))
    console.print(memory)


def draw(runs: Sequence[Results]) -> str:
    """How many wait longer than so long, and each node's memory."""
    waits = [svg.Line(r.name, _survival(r)) for r in runs]
    charts = [
        svg.lines("Requests that wait longer", "seconds", "share of requests", waits, log_x=True, log_y=True),
        *(
            svg.bars(
                f"Memory in use, {r.name}: mean, and the most (line)",
                "share of the node's",
                [svg.Bar(n.name, n.mean_mb / n.total_mb, n.peak_mb / n.total_mb) for n in r.nodes],
            )
            for r in runs
        ),
    ]
    return svg.page(charts)


def _survival(found: Results, points: int = 200) -> list[tuple[float, float]]:
    """(seconds, share that waits longer); thinned out, the longest waits kept."""
    waits, count = found.waits, len(found.waits)
    drawn: list[tuple[float, float]] = []
    left = float(count)
    while left >= 1:
        wait = waits[count - int(left)]
        if wait > 0.05:
            drawn.append((wait, left / count))
        left = min(left * 0.96, left - 1) if left > points else left - 1
    return drawn


def as_dict(found: Results) -> dict[str, Any]:
    return {
        "name": found.name,
        "requests": found.requests,
        "seconds": found.seconds,
        "cold_starts": found.cold_starts,
        "cold_requests": found.cold_requests,
        "copies": found.copies,
        "evictions": found.evictions,
        "drains": found.drains,
        "load_seconds": found.load_seconds,
        "refused": found.refused,
        "wait_s": {"mean": found.mean_wait_s, "p50": found.wait_s(0.5), "p99": found.wait_s(0.99)},
        "prompts_cached": round(found.cached, 4),
        "tokens_per_second": found.tokens_per_second,
        "nodes": [
            {"name": n.name, "total_mb": n.total_mb, "mean_mb": round(n.mean_mb), "peak_mb": n.peak_mb}
            for n in found.nodes
        ],
    }
