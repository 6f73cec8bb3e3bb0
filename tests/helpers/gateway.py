"""A real `cortex serve` for tests: a process of its own on free ports, its log read for the address."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from tests.helpers.neuron_daemon import OURS, Daemon

from helexa.core.relay.upstream import Answer, Upstream

SETTINGS = """
drain_s = 5
[gateway]
listen = "127.0.0.1:0"
metrics_listen = "127.0.0.1:0"
body_limit_mb = 1
[poll]
interval_s = 0.4
"""

# For a node with `isolation = "none"`: while its engine loads it answers nothing, and may be taken for dead.
PATIENT = SETTINGS.replace("interval_s = 0.4", "interval_s = 5")


class Gateway:
    """daemon: the process; ask and api: the same server for whole answers and for streams."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.api = Upstream("gateway", daemon.url)
        self.metrics_api = Upstream("metrics", f"http://{daemon.wait_for(event='listening')['metrics']}")

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.api.fetch("GET", path, headers=headers)

    async def post(self, path: str, body: Any, *, headers: Mapping[str, str] | None = None) -> Answer:
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return await self.api.fetch("POST", path, raw, headers=headers, timeout_s=20)

    async def chat(self, model: str, *, headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
        return await self.post("/v1/chat/completions", asking(model, **fields), headers=headers)

    async def until_up(self, *names: str) -> None:
        for name in names:
            await asyncio.to_thread(self.daemon.wait_for, 10.0, event="node is up", node=name)

    async def until(self, path: str, condition: Callable[[Any], bool]) -> Any:
        """What GET `path` says once the condition holds of it."""
        async with asyncio.timeout(10):
            while not condition(said := (await self.get(path)).json()):
                await asyncio.sleep(0.02)
        return said

    async def samples(self) -> dict[str, float]:
        """The metrics port's, by name and labels."""
        answer = await self.metrics_api.fetch("GET", "/metrics")
        lines = answer.body.decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    async def line(self, **fields: Any) -> dict[str, Any]:
        """The log's line of a request with these fields."""
        return await asyncio.to_thread(self.daemon.wait_for, 5.0, event="request", **fields)

    async def stop(self) -> int:
        return await asyncio.to_thread(self.daemon.stop)


def asking(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], **fields}


def write_settings(folder: Path, nodes: Mapping[str, str], toml: str = SETTINGS, models: str = "") -> Path:
    neurons = "".join(f'\n[[neurons]]\nname = "{name}"\nendpoint = "{url}"\n' for name, url in nodes.items())
    config = folder / "cortex.toml"
    config.write_text(toml + neurons)
    if models:
        (folder / "models.toml").write_text(models)
    return config


def environment() -> dict[str, str]:
    """Ours, without what would change the programs' settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NEURON_", "CORTEX_", "HF_"))}
    return clean | {"PYTHONPATH": OURS}


@asynccontextmanager
async def cortex(
    folder: Path, nodes: Mapping[str, str], *, toml: str = SETTINGS, models: str = "", args: tuple[str, ...] = ()
) -> AsyncIterator[Gateway]:
    """For fakes that live on the caller's loop, which goes on meanwhile."""
    config = write_settings(folder, nodes, toml, models)
    command = ["-m", "helexa.cortex", "serve", "--config", str(config), *args]
    daemon = await asyncio.to_thread(Daemon, command, environment())
    gateway = Gateway(daemon)
    try:
        yield gateway
    finally:
        gateway.api.close()
        gateway.metrics_api.close()
        await asyncio.to_thread(daemon.close)


@contextmanager
def cortex_process(
    folder: Path, nodes: Mapping[str, str], *, toml: str = SETTINGS, models: str = ""
) -> Iterator[Daemon]:
    """For tests without a loop of their own."""
    config = write_settings(folder, nodes, toml, models)
    daemon = Daemon(["-m", "helexa.cortex", "serve", "--config", str(config)], environment())
    try:
        yield daemon
    finally:
        daemon.close()
