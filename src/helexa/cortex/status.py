"""`cortex status` and `cortex models`: the fleet for the eye, or as JSON. What is unknown is shown as nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from helexa.cortex.client import DEFAULT_URL, Client, CommandFailed
from helexa.cortex.operate import is_serving, percent, print_json

BAR_WIDTH: Final = 20
_EVERY_S: Final = 1.0
_STATE_STYLE: Final = {
    "up": "green", "suspect": "yellow", "draining": "yellow", "down": "red",
    "loaded": "green", "loading": "yellow", "downloading": "yellow", "recovering": "yellow", "failed": "red",
}  # fmt: skip


async def show(url: str | None, *, as_json: bool) -> None:
    async with Client(url or DEFAULT_URL) as gateway:
        fleet = await gateway.get("/fleet")
    if as_json:
        print_json(fleet)
    else:
        console().print(render(fleet, gateway.url, now()))


async def watch(url: str | None, *, as_json: bool) -> None:
    """Until Ctrl-C; a gateway that goes away meanwhile is told, and waited for."""
    async with Client(url or DEFAULT_URL) as gateway:
        await gateway.get("/fleet")  # a wrong address ends the command; only a later failure is waited out
        if as_json:
            while True:
                sys.stdout.write(msgspec.json.encode(await gateway.get("/fleet")).decode() + "\n")
                sys.stdout.flush()
                await asyncio.sleep(_EVERY_S)
        with Live(console=console(), auto_refresh=False) as live:
            while True:
                try:
                    live.update(render(await gateway.get("/fleet"), gateway.url, now()), refresh=True)
                except CommandFailed as failed:
                    live.update(Text(str(failed), style="red"), refresh=True)
                await asyncio.sleep(_EVERY_S)


async def show_models(url: str | None, *, as_json: bool) -> None:
    async with Client(url or DEFAULT_URL) as gateway:
        listed = await gateway.get("/v1/models")
    if as_json:
        print_json(listed["data"])
    elif not listed["data"]:
        sys.stderr.write("cortex: no models: no node has any on disk, and no models.toml names one\n")
    else:
        console().print(models_table(listed["data"]))


def now() -> datetime:
    return datetime.now(UTC)


def render(fleet: Mapping[str, Any], url: str, at: datetime) -> RenderableType:
    """The whole of `cortex status`."""
    busy = fleet["inflight"]
    head = Text.assemble(
        ("helexa cortex ", "bold"),
        fleet["version"],
        f"  {url}  ",
        f"{busy} request{'' if busy == 1 else 's'} in flight",
    )
    parts: list[RenderableType] = [head]
    parts += [Text(f"! {warning}", style="yellow") for warning in fleet.get("warnings", ())]
    for node in fleet["nodes"]:
        parts += [Text(), *_node(node, at)]
    if not fleet["nodes"]:
        parts += [Text(), Text("no nodes: name them under [[neurons]] in cortex.toml, or try `cortex up`", style="dim")]
    if fleet["models"]:
        parts += [Text(), models_table(fleet["models"])]
    return Group(*parts)


def models_table(entries: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("MODEL", "STATUS", "NODES", "CONTEXT", "CAN", "ALSO"):
        # folded and never cut: an id is there to be typed
        table.add_column(name, justify="right" if name == "CONTEXT" else "left", overflow="fold")
    for entry in entries:
        status = entry["status"]["value"]
        context = entry.get("max_model_len")
        loaded = [n["name"] for n in entry.get("nodes", ()) if is_serving(n)]
        others = [_elsewhere(n) for n in entry.get("nodes", ()) if not is_serving(n)]
        table.add_row(
            entry["id"],
            _state(status),
            Text.assemble(", ".join(loaded), " " if loaded and others else "", (", ".join(others), "dim")),
            f"{context:,}" if context else "",
            ", ".join(entry.get("capabilities", ())),
            ", ".join(entry.get("aliases", ())),
        )
    return table


def _elsewhere(node: Mapping[str, Any]) -> str:
    """A node that has the model and does not serve it now; its state, where that is why."""
    return f"{node['name']} ({node['state']})" if "state" in node else str(node["name"])


def bar(used: float, total: float, width: int = BAR_WIDTH) -> Text:
    """ "[██████····]": how much of a device's memory is taken."""
    share = min(max(used / total, 0.0), 1.0) if total > 0 else 0.0
    full = round(share * width)
    style = "red" if share > 0.95 else "yellow" if share > 0.8 else "green"
    return Text.assemble("[", ("█" * full, style), ("·" * (width - full), "dim"), "]")


def age(since: str, at: datetime) -> str:
    """RFC 3339 to "3 min"."""
    seconds = max(0, int((at - datetime.fromisoformat(since)).total_seconds()))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _node(node: Mapping[str, Any], at: datetime) -> Iterator[RenderableType]:
    line = Text.assemble((node["name"], "bold"), "  ", _state(node["state"]), f" for {age(node['since'], at)}")
    line.append(f"  {node['endpoint']}", "dim")
    if version := (node.get("version") or {}).get("version"):
        line.append(f"  neuron {version}", "dim")
    yield line
    if node.get("set_aside"):
        yield Text(f"  drained by the operator; `cortex resume {node['name']}` ends that", style="yellow")
    if error := node.get("last_error"):
        yield Text(f"  {error}", style="yellow")
    discovery = node.get("discovery") or {}
    if error := discovery.get("error"):
        yield Text(f"  {error}", style="red")
    health = {d["index"]: d for d in (node.get("health") or {}).get("devices", ())}
    for device in discovery.get("devices", ()):
        yield _device(device, health.get(device["index"], {}))
    active = [m for m in node["models"] if m["status"] != "unloaded"]
    if active:
        yield _node_models(active)
    for info in active:
        if error := info.get("error"):
            yield Padding(Text(f"{info['id']}: {error}", style="red"), (0, 0, 0, 2))


def _device(device: Mapping[str, Any], health: Mapping[str, Any]) -> Text:
    line = Text(f"  {device['index']}  {device['name']}  ")
    used, free = health.get("vram_used_mb"), health.get("vram_free_mb")
    total = device.get("vram_total_mb")
    if total is None and used is not None and free is not None:
        total = used + free
    if used is not None and total:
        line.append_text(bar(used, total))
        line.append(f" {used / 1024:.1f} / {total / 1024:.1f} GB")
    elif total:
        line.append(f"{total / 1024:.1f} GB")
    if (utilization := health.get("utilization_pct")) is not None:
        line.append(f"  {utilization:.0f} %")
    if (temperature := health.get("temp_c")) is not None:
        line.append(f"  {temperature:.0f} °C")
    if error := health.get("error") or device.get("error"):
        line.append(f"  {error}", "red")
    return line


def _node_models(active: list[dict[str, Any]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    for info in active:
        running, queued = info.get("active_requests"), info.get("queued_requests")
        work = [f"{running} running" if running else "", f"{queued} queued" if queued else ""]
        memory = info.get("vram_used_mb")
        table.add_row(
            Padding(info["id"], (0, 0, 0, 2)),
            Text.assemble(
                _state(info["status"]),
                percent(info.get("progress")),
                (" not as models.toml has it" if info.get("loaded_differently") else "", "yellow"),
            ),
            f"{memory / 1024:.1f} GB" if memory else "",
            ", ".join(filter(None, work)),
        )
    return table


def _state(word: str) -> Text:
    return Text(word, style=_STATE_STYLE.get(word, "dim"))


def console() -> Console:
    """Not cut to a width that nobody has: a pipe gets whole lines."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)
