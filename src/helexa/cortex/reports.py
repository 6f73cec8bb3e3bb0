"""`cortex decisions` and `cortex plan`: what the gateway decided about loading, and would decide now."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from helexa.cortex.client import DEFAULT_URL, Client
from helexa.cortex.operate import print_json
from helexa.cortex.status import console

_STYLE: Final = {
    "load": "green", "copy": "green", "evict": "yellow", "stays": "yellow", "wait": "yellow", "timed_out": "red",
    "refuse": "red", "load_failed": "red",
}  # fmt: skip
_WOULD: Final = {
    "serve": "would be served", "load": "would be loaded", "wait": "would wait", "refuse": "would be refused"
}  # fmt: skip
_ACTION_STYLE: Final = {"serve": "green", "load": "green", "wait": "yellow", "refuse": "red"}
_SAID: Final = {"load_failed": "load failed", "timed_out": "timed out", "give_up": "give up"}


async def decisions(url: str | None, model: str | None, *, last: int, everything: bool, as_json: bool) -> None:
    """The latest last, as in a log. model: only what concerns this one. everything: what else was weighed, by node."""
    async with Client(url or DEFAULT_URL) as gateway:
        listed = (await gateway.get("/fleet/decisions"))["decisions"]
        if model is not None:
            model = (await gateway.get(f"/v1/models/{model}"))["id"]
    shown = [d for d in listed if model is None or model in (d.get("model"), d.get("wanted"))][:last]
    shown.sort(key=lambda d: str(d.get("last_at", d["at"])))
    if as_json:
        print_json(shown)
    elif not shown:
        about = f" about {model}" if model is not None else ""
        sys.stderr.write(f"cortex: nothing has been decided{about} since the gateway started\n")
    else:
        console().print(decisions_table(shown, everything=everything))


def decisions_table(decisions: list[dict[str, Any]], *, everything: bool = False) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("WHEN", "WHAT", "MODEL", "NODE", "FOR", "PRICE", "WHY"):
        table.add_column(name, justify="right" if name == "PRICE" else "left", overflow="fold", no_wrap=name == "WHEN")
    for d in decisions:
        times = f" ×{d['times']}" if d.get("times", 1) > 1 else ""
        table.add_row(
            _clock(d.get("last_at", d["at"])),
            Text(_SAID.get(d["what"], d["what"]) + times, style=_STYLE.get(d["what"], "dim")),
            d.get("model", ""),
            d.get("node", ""),
            _whom(d),
            "" if "price" not in d else f"{d['price']:.3g}",
            Group(d["why"], *(Text(line, style="dim") for line in _weighed(d))) if everything else d["why"],
        )
    return table


async def plan(url: str | None, model: str, *, as_json: bool) -> None:
    async with Client(url or DEFAULT_URL) as gateway:
        foreseen = await gateway.get(f"/fleet/plan?{urlencode({'model': model})}", timeout_s=30.0)
    if as_json:
        print_json(foreseen)
    else:
        console().print(plan_report(foreseen))


def plan_report(foreseen: Mapping[str, Any]) -> RenderableType:
    """The whole of `cortex plan`."""
    where = f" on {foreseen['node']}" if "node" in foreseen else ""
    head = Text.assemble(
        (f"{foreseen['model']} ", "bold"), (_WOULD[foreseen["action"]] + where, _ACTION_STYLE[foreseen["action"]])
    )
    if error := foreseen.get("error"):
        head.append(f" with {error['status']} {error['code']}")
    parts: list[RenderableType] = [head, Text(f"  {foreseen['why']}")]
    if candidates := foreseen.get("candidates"):
        parts.append(Text(f"  of {', '.join(candidates)}: the first that can serve it in time", style="dim"))
    for title, placement in (("", foreseen.get("load")), ("then: ", foreseen.get("then"))):
        if placement is not None:
            parts += [Text(f"  {title}{line}") for line in _placement(placement)]
    if replicas := foreseen.get("replicas"):
        parts.append(_of_nodes(("NODE", "STATE", "IN FLIGHT"), _replicas(replicas)))
    if weighed := foreseen.get("weighed"):
        parts.append(_of_nodes(("NODE", "WEIGHED"), [(w["node"], said_of(w)) for w in weighed]))
    if more := foreseen.get("not_shown"):
        parts.append(Text(f"  and {more} other nodes", style="dim"))
    return Group(*parts)


def _placement(placement: Mapping[str, Any]) -> Iterator[str]:
    if devices := placement.get("devices"):
        parts = " and ".join(f"{d['mb']:,} MB on device {d['index']}" for d in devices)
        left = f", {placement['left_mb']:,} MB left over" if "left_mb" in placement else ""
        yield f"{placement['node']}: {parts}{left}"
    for victim in placement.get("victims", ()):
        finishes = ", in use, has to finish first" if victim.get("drains") else f", idle for {victim['idle_s']:,.0f} s"
        yield f"goes first: {victim['model']}, {victim['mb']:,} MB{finishes}, score {victim['score']:.3g}"
    if "seconds" in placement:
        yield f"the load takes about {placement['seconds']:,.0f} s"


def _replicas(replicas: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for replica in replicas:
        others = f" and {replica['others']} of others" if "others" in replica else ""
        mark = " <" if replica.get("chosen") else ""
        full = ", no more" if replica.get("full") else ""
        yield replica["node"] + mark, replica["state"], f"{replica['inflight']}{others}{full}"


def _of_nodes(heads: Iterable[str], rows: Iterable[tuple[str, ...]]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return Padding(table, (1, 0, 0, 2), expand=False)


def _clock(at: str) -> str:
    """In the reader's own time."""
    return datetime.fromisoformat(at).astimezone().strftime("%d %H:%M:%S")


def _whom(decision: Mapping[str, Any]) -> str:
    wanted = decision.get("wanted")
    requests = decision.get("requests", [])
    more = decision.get("waiting", 0) - len(requests)
    asked = ", ".join(requests[:2]) + (f" and {more + len(requests) - 2} more" if more + len(requests) > 2 else "")
    by = asked if decision["by"] == "request" and asked else decision["by"]
    return f"{wanted} ({by})" if wanted else by


def _weighed(decision: Mapping[str, Any]) -> Iterator[str]:
    for node in decision.get("weighed", ()):
        yield f"{node['node']}: {said_of(node)}"
    if more := decision.get("not_shown"):
        yield f"and {more} other nodes"


def said_of(node: Mapping[str, Any]) -> str:
    """One node that was weighed: its price and victims, or its reason."""
    if "reason" in node:
        return str(node["reason"])
    seconds = f", about {node['seconds']:.0f} s" if "seconds" in node else ""
    if not node.get("victims"):
        return f"has room{seconds}"
    return f"price {node['price']:.3g}: without {', '.join(node['victims'])}{seconds}"
