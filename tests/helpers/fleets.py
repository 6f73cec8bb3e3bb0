"""Fleets for tests: nodes that nobody listens on, told by hand what the poller would have seen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from helexa.core.catalogue import Catalogue, ModelProfile
from helexa.core.config import CortexSettings, NeuronEntry
from helexa.core.discovery import DeviceHealth, NodeHealth
from helexa.core.lifecycle import ModelInfo
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import Node


def settings(*names: str, **changes: Any) -> CortexSettings:
    neurons = [NeuronEntry(name=name, endpoint=f"http://{name}.invalid:13131") for name in names]
    return CortexSettings(neurons=neurons, **changes)


def fleet(
    *names: str,
    models: Iterable[ModelProfile] = (),
    aliases: Mapping[str, str | list[str]] | None = None,
    **changes: Any,
) -> Fleet:
    """All nodes down, as at the start."""
    return Fleet(settings(*names, **changes), Catalogue(models=list(models), aliases=dict(aliases or {})))


def health(status: str = "ok", free_mb: int | None = None) -> NodeHealth:
    return NodeHealth(status=status, uptime_secs=10, devices=[DeviceHealth(index=0, vram_free_mb=free_mb)])


def answers(view: Fleet, name: str, *models: ModelInfo, status: str = "ok", free_mb: int | None = None) -> Node:
    """A poll of this node that was sent and answered just now."""
    node = view.nodes[name]
    view.saw_poll(node, models=models, health=health(status, free_mb), started=time.monotonic())
    return node


def info(model_id: str, status: str = "loaded", **fields: Any) -> ModelInfo:
    return ModelInfo(id=model_id, status=status, **fields)


async def until(view: Fleet, condition: Callable[[], bool]) -> None:
    """Waits for a change of the view after which the condition holds."""
    changed = asyncio.Event()

    def set_changed(_: str | None) -> None:
        changed.set()

    view.on_change.append(set_changed)
    try:
        while not condition():
            changed.clear()
            await changed.wait()
    finally:
        view.on_change.remove(set_changed)
