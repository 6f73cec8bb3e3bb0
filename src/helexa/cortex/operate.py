"""`cortex load`, `unload`, `drain` and `resume`: an operator's wishes, with progress on stderr."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

import msgspec

from helexa.core.aliases import ANY
from helexa.cortex.client import DEFAULT_URL, Client, CommandFailed, Refused

_LOOK_EVERY_S: Final = 0.3
_COMPLETION_S: Final = 0.7  # a shell's completion that takes longer is worse than none


async def load(url: str | None, model: str, node: str | None, *, as_json: bool) -> None:
    order = {"model": model, **({"node": node} if node else {})}
    async with Client(url or DEFAULT_URL) as gateway:
        work = asyncio.create_task(gateway.post("/models/load?wait=true", order, timeout_s=None))
        shown = Progress()
        try:
            while not (await asyncio.wait([work], timeout=_LOOK_EVERY_S))[0]:
                shown.show(await _progress(gateway, model))
        finally:
            shown.clear()
            work.cancel()
            await asyncio.wait([work])
        work.result()
        entry = await gateway.get(f"/v1/models/{model}")
    loaded = [n["name"] for n in entry.get("nodes", ()) if is_serving(n)]
    if as_json:
        print_json({"model": entry["id"], "status": "loaded", "nodes": loaded})
    else:
        print(f"{entry['id']} is loaded on {', '.join(loaded) or 'a node'}")


async def unload(url: str | None, model: str, node: str | None, *, drain_s: float, force: bool, as_json: bool) -> None:
    order: dict[str, Any] = {"model": model, "drain_s": drain_s}
    if node:
        order["node"] = node
    if force:
        order["force"] = True
    async with Client(url or DEFAULT_URL) as gateway:
        try:
            await gateway.post("/models/unload", order, timeout_s=None)
        except Refused as refused:
            if refused.error_code != "model_in_use":
                raise
            raise CommandFailed(f"{refused} (here: --drain SECONDS, or --force)") from None
        entry = await gateway.get(f"/v1/models/{model}")
    if as_json:
        print_json({"model": entry["id"], "status": "unloaded"})
    else:
        print(f"{entry['id']} is unloaded" + (f" from {node}" if node else ""))


async def drain(url: str | None, node: str, *, wait: bool, as_json: bool) -> None:
    """wait: until nothing runs there any more."""
    async with Client(url or DEFAULT_URL) as gateway:
        said = await gateway.post(f"/fleet/nodes/{quote(node, safe='')}/drain", {})
        shown = Progress()
        try:
            while wait and (running := await _running(gateway, node)):
                shown.show(f"{running} request{'' if running == 1 else 's'} on {node}")
                await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            shown.clear()
        running = await _running(gateway, node)
    if as_json:
        print_json({**said, "running": running})
    else:
        rest = f"{running} request{'' if running == 1 else 's'} still on it" if running else "nothing runs on it"
        print(f"{node} is drained: it gets no new requests and no loads, {rest}")


async def resume(url: str | None, node: str, *, as_json: bool) -> None:
    async with Client(url or DEFAULT_URL) as gateway:
        said = await gateway.post(f"/fleet/nodes/{quote(node, safe='')}/resume", {})
    if as_json:
        print_json(said)
    else:
        print(f"{node} takes requests and loads again" + ("" if said["state"] == "up" else f"; it is {said['state']}"))


async def _running(gateway: Client, node: str) -> int:
    """Requests on a node, other gateways' too."""
    fleet = await gateway.get("/fleet")
    models = [info for n in fleet["nodes"] if n["name"] == node and n["state"] != "down" for info in n["models"]]
    told = [info.get("active_requests", 0) + info.get("queued_requests", 0) for info in models]
    return sum(max(info["inflight"], of) for info, of in zip(models, told, strict=True))


def model_names(url: str | None) -> list[str]:
    """Ids and aliases, for a shell's completion; empty where no gateway answers."""

    async def ask() -> list[str]:
        async with Client(url or DEFAULT_URL) as gateway:
            listed = await gateway.get("/v1/models", timeout_s=_COMPLETION_S)
        names = (name for entry in listed["data"] for name in (entry["id"], *entry.get("aliases", ())))
        return list(dict.fromkeys(name for name in names if ANY not in name))

    try:
        return asyncio.run(ask())
    except CommandFailed:
        return []


async def _progress(gateway: Client, model: str) -> str:
    """ "loading on beast: 43 %", from the fleet's view."""
    entry = await gateway.get(f"/v1/models/{model}")
    fleet = await gateway.get("/fleet")
    for node in fleet["nodes"]:
        for info in node["models"]:
            if info["id"] == entry["id"] and info["status"] in ("loading", "downloading"):
                return f"{info['status']} on {node['name']}{percent(info.get('progress'))}"
    return f"waiting ({entry['status']['value']})"


def is_serving(node: Mapping[str, Any]) -> bool:
    """One of `nodes` of a model's entry: loaded there, and the node is well (else its state is told)."""
    return node["status"] == "loaded" and "state" not in node


def percent(progress: dict[str, Any] | None) -> str:
    fraction = progress.get("fraction") if progress else None
    return "" if fraction is None else f": {fraction:.0%}".replace("%", " %")


class Progress:
    """A line on stderr that replaces itself; on no terminal, a line for each change of words."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._last = ""

    def show(self, text: str) -> None:
        if text == self._last:
            return
        if self._is_terminal:
            sys.stderr.write(f"\r\x1b[K{text}")
        elif text.partition(":")[0] != self._last.partition(":")[0]:  # not one for each percent
            sys.stderr.write(f"{text}\n")
        self._last = text
        sys.stderr.flush()

    def clear(self) -> None:
        if self._is_terminal and self._last:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        self._last = ""


def print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
