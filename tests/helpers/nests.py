"""Models with the scripted harness, real hosts and a folder of their own, and what they leave behind."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
from tests.helpers.neuron_daemon import OURS
from tests.helpers.scripted import Script, ScriptedHarness, write_model

from helexa.core.config import NeuronSettings
from helexa.core.discovery import Device, DeviceHealth
from helexa.core.errors import Dialect
from helexa.core.lifecycle import LoadRequest, ModelInfo, UnloadRequest
from helexa.core.relay.contract import Endpoint, Exchange
from helexa.core.relay.upstream import Answer
from helexa.neuron.discovery import Probe, Reading
from helexa.neuron.models import Models, Seat
from helexa.neuron.store import Store

CHAT = Endpoint("/v1/chat/completions", Dialect.OPENAI, "/v1/chat/completions")


class Nest:
    """events: all that was published, oldest first."""

    def __init__(self, models: Models, folder: Path, run_dir: Path) -> None:
        self.models = models
        self.folder = folder
        self.run_dir = run_dir
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._news = asyncio.Event()

    def publish(self, kind: str, body: dict[str, Any]) -> None:
        self.events.append((kind, body))
        self._news.set()

    def model(self, name: str, script: Script | None = None) -> Path:
        return write_model(self.folder / f"{name}.gguf", script)

    def request(self, name: str, **fields: Any) -> LoadRequest:
        return LoadRequest(model_id=name, source=str(self.folder / f"{name}.gguf"), **fields)

    async def load(self, name: str, *, wait: bool = True, **fields: Any) -> str:
        return await self.models.load(self.request(name, **fields), wait=wait, local_caller=True)

    async def unload(self, name: str, **fields: Any) -> None:
        await self.models.unload(UnloadRequest(model_id=name, **fields))

    def info(self, name: str) -> ModelInfo:
        info = self.models.info(name)
        assert info is not None
        return info

    def states(self, name: str) -> list[str]:
        """The states that were published, each once in a row."""
        seen: list[str] = []
        for kind, body in self.events:
            if kind == "model" and body["id"] == name and (not seen or seen[-1] != body["status"]):
                seen.append(body["status"])
        return seen

    async def until(self, true: Callable[[], bool]) -> None:
        """Looks again whenever something was published."""
        while not true():
            self._news.clear()
            await self._news.wait()

    async def ask(self, name: str, body: str = "{}") -> Answer:
        """One request, as the relay makes it: a seat, its upstream, the seat back."""
        seat = await self.seat(name)
        try:
            return await seat.upstream.fetch("POST", CHAT.path, body.encode())
        finally:
            seat.release()

    async def seat(self, name: str, client: str = "test") -> Seat:
        seat = self.models.admit(exchange(name, client))
        return seat if isinstance(seat, Seat) else await seat

    def pid(self, name: str) -> int:
        serving = self.models._residents[name].serving
        assert serving is not None
        assert serving.host.pid is not None
        return serving.host.pid

    async def scan(self) -> None:
        """Have the daemon look at its disk now, not in a few seconds."""
        await self.models._scan()

    def sockets(self) -> list[Path]:
        return sorted(self.run_dir.glob("*/*.sock"))


def exchange(model: str, client: str = "test", head: bytes = b"POST / HTTP/1.1\r\n\r\n") -> Exchange:
    return Exchange(
        endpoint=CHAT,
        head=head,
        body=b"{}",
        model=model,
        stream=False,
        wants_usage=False,
        gateway_usage=False,
        request_id="r",
        client=client,
        t_start=1.0,
    )


@asynccontextmanager
async def nest(
    folder: Path,
    *,
    total_mb: int = 10_000,
    says_mb: Callable[[], int] | None = None,
    kind: str = "cpu",
    process_mb: Callable[[int], dict[int, int]] = lambda pid: {},
    refuse_loads: str | None = None,
    backoff_s: float = 0.01,
    **settings: Any,
) -> AsyncIterator[Nest]:
    """Started, and stopped at the end: then no process and no socket may be left."""
    os.environ["PYTHONPATH"] = OURS  # the hosts import the harness from here
    device = Device(index=0, name="test", kind=kind, vram_total_mb=total_mb)

    def health() -> list[DeviceHealth]:
        free = total_mb if says_mb is None else says_mb()
        return [DeviceHealth(index=0, vram_used_mb=total_mb - free, vram_free_mb=free)]

    with tempfile.TemporaryDirectory(prefix="helexa-test-") as run_dir:  # pytest's folders are too long for a socket
        kept = str(folder / "kv")
        settings = {"models_dir": str(folder), "run_dir": run_dir, "spare_host": False, "kv_store_dir": kept} | settings
        wanted = NeuronSettings(**settings)
        nests: list[Nest] = []
        models = Models(
            wanted,
            harnesses={"scripted": ScriptedHarness()},
            probe=Probe(Reading(devices=[device], health=health, refuse_loads=refuse_loads, process_mb=process_mb)),
            store=Store(
                models_dir=folder, allowed_roots=[], allow_downloads=False, gguf_owners=[], hf_home=folder / "hub"
            ),
            publish=lambda kind, body: nests[0].publish(kind, body),
            backoff_s=backoff_s,
        )
        nests.append(Nest(models, folder, Path(run_dir)))
        before = set(children())
        await models.start()
        try:
            yield nests[0]
        finally:
            await models.stop()
            left = [process for process in children() if process not in before and process.is_running()]
            assert not left, left
            assert not os.listdir(run_dir)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


async def read_out(stream: AsyncIterator[bytes]) -> bytes:
    """All that comes."""
    return b"".join([data async for data in stream])
