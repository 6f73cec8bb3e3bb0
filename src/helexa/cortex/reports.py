"""`cortex decisions`: what the gateway decided about loading, for the eye or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from helexa.cortex.client import DEFAULT_URL, Client
from helexa.cortex.operate import print_json
from helexa.cortex.status import console

_STYLE: Final = {
    "load": "green", "copy": "green", "evict": "yellow", "stays": "yellow", "wait": "yellow", "timed_out": "red",
    "refuse": "red", "load_failed": "red",
}  # fmt: skip
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
