"""A neuron's control plane for tests of faults: a small real program that obeys, lies, hangs and dies on command.

It holds models in a memory of `memory_mb`, loads when `load_may_end` is set, and counts what it was asked. Real
neurons are in tests/e2e.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from helexa.core import sse
from helexa.core.lifecycle import LoadRequest, ModelInfo, Progress, UnloadRequest
from helexa.core.relay.server import Server


class FakeNeuron:
    """answers:     path -> (status, body) that it gives in place of the truth
    hanging:        paths that are never answered ("*": none is)
    load_errors:    model -> error members and a status for POST /models/load
    load_failure:   what a load ends with in place of "loaded"
    really_needs_mb: what a load takes in truth; where that is not there, it runs out of memory
    """

    def __init__(self, *, memory_mb: int = 10_000, events: bool = True, token: str | None = None) -> None:
        self.memory_mb = memory_mb
        self.events = events
        self.token = token
        self.needs_mb: dict[str, int] = {}
        self.models: dict[str, ModelInfo] = {}
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.hanging: set[str] = set()
        self.load_errors: dict[str, tuple[int, dict[str, Any]]] = {}
        self.load_failure: str | None = None
        self.isolation = "process"
        self.really_needs_mb: dict[str, int] = {}
        self.load_may_end = asyncio.Event()
        self.load_may_end.set()
        self.asked: Counter[str] = Counter()
        self.loads: list[LoadRequest] = []
        self.unloads: list[UnloadRequest] = []
        self.uptime_from = time.monotonic()
        self.seq = 0
        self.port = 0
        self._server: Server | None = None
        self._listeners: set[asyncio.Queue[bytes]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed: list[asyncio.Event] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """On its port of before, if it had one."""
        paths: dict[str, Callable[[Request], Any]] = {
            "/models": self._models,
            "/health": self._health,
            "/discovery": self._discovery,
            "/version": self._version,
            "/events": self._events,
            "/models/load": self._load,
            "/models/estimate": self._estimate,
            "/models/unload": self._unload,
            "/defrag": self._defrag,
        }
        routes = [Route(p, self._guarded(p, f), methods=["GET", "POST"]) for p, f in paths.items()]
        routes += self.more_routes()
        self.uptime_from = time.monotonic()
        self._server = Server(director=None, app=Starlette(routes=routes))
        _, self.port = await self._server.listen("127.0.0.1", self.port)

    def more_routes(self) -> list[Route]:
        """For one that answers requests too."""
        return []

    async def die(self) -> None:
        """As by kill -9: connections break, what was loaded is gone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            for connection in list(self._server.connections):
                connection.transport.abort()
            await self._server.close()
            self._server = None
        self._listeners.clear()
        self.seq = 0
        for info in self.models.values():
            info.status, info.vram_used_mb, info.progress = "unloaded", None, None

    # what happens on it

    def put(self, model_id: str, status: str, *, tell: bool = True, **fields: Any) -> None:
        """A model changes, with an event for those who listen."""
        self.models[model_id] = info = ModelInfo(id=model_id, status=status, **fields)
        if tell:
            self.publish("model", msgspec.to_builtins(info))

    def publish(self, kind: str, body: dict[str, Any]) -> None:
        self.seq += 1
        self.say(msgspec.json.encode({"seq": self.seq, "type": kind, **body}))

    def say(self, data: bytes) -> None:
        """Whatever these bytes are, as an event."""
        for queue in self._listeners:
            queue.put_nowait(sse.frame(data))

    @property
    def is_listened_to(self) -> bool:
        return bool(self._listeners)

    async def until_asked(self, path: str, times: int = 1) -> None:
        """`times` more requests for a path, or ("") any."""
        news = asyncio.Event()
        self._changed.append(news)
        count = self.asked.total if path == "" else lambda: self.asked[path]
        wanted = count() + times
        while count() < wanted:
            news.clear()
            await news.wait()
        self._changed.remove(news)

    # answers

    def _guarded(self, path: str, truth: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            self.asked[path] += 1
            for news in self._changed:
                news.set()
            if path in self.hanging or "*" in self.hanging:
                await asyncio.Event().wait()
            if self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
                return _error(401, code="invalid_api_key", message="no or bad token")
            if path in self.answers:
                status, body = self.answers[path]
                return Response(body, status, media_type="application/json")
            made: Response = await truth(request)
            return made

        return answer

    async def _models(self, request: Request) -> Response:
        return _json(list(self.models.values()))

    async def _health(self, request: Request) -> Response:
        used = sum(m.vram_used_mb or 0 for m in self.models.values())
        device = {"index": 0, "vram_used_mb": used, "vram_free_mb": self.memory_mb - used}
        uptime = time.monotonic() - self.uptime_from
        return _json({"status": "ok", "uptime_secs": uptime, "devices": [device]})

    async def _discovery(self, request: Request) -> Response:
        device = {"index": 0, "name": "CPU", "kind": "cpu", "vram_total_mb": self.memory_mb}
        told = {"hostname": "h", "os": "Linux", "kernel": "6", "devices": [device], "harnesses": ["llama"]}
        return _json({**told, "isolation": self.isolation})

    async def _version(self, request: Request) -> Response:
        return _json({"version": "0.1.0", "commit": None, "python": "3.11", "engines": {}})

    async def _events(self, request: Request) -> Response:
        if not self.events:
            return _error(404, code="not_found", message="no such path")
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        snapshot = {"seq": self.seq, "type": "snapshot", "models": list(self.models.values()), "devices": []}
        queue.put_nowait(sse.frame(msgspec.json.encode({**snapshot, "draining": False})))
        self._listeners.add(queue)

        async def frames() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield await queue.get()
            finally:
                self._listeners.discard(queue)

        return StreamingResponse(frames(), media_type="text/event-stream")

    async def _estimate(self, request: Request) -> Response:
        order = msgspec.json.decode(await request.body(), type=LoadRequest)
        if order.id not in self.needs_mb:
            return _error(404, code="model_not_found", message=f"{order.id} is not on this node's disk")
        part = {"index": 0, "weights_mb": self.needs_mb[order.id], "kv_mb": 0, "overhead_mb": 0}
        return _json({"fits": True, "devices": [part]})

    async def _load(self, request: Request) -> Response:
        order = msgspec.json.decode(await request.body(), type=LoadRequest)
        self.loads.append(order)
        if order.id in self.load_errors:
            status, error = self.load_errors[order.id]
            return _error(status, **error)
        known = self.models.get(order.id)
        if known is not None and known.status in ("loaded", "loading"):
            return _json({"status": known.status}, 200 if known.status == "loaded" else 202)
        need = self.needs_mb.get(order.id, 100)
        free = self.memory_mb - sum(m.vram_used_mb or 0 for m in self.models.values())
        if need > free:
            told = {"need_mb": need, "free_mb": free}
            return _error(409, code="insufficient_memory", message=f"needs {need} MB, {free} MB are free", **told)
        self.put(order.id, "loading", vram_used_mb=need, progress=Progress(fraction=0.43))
        task = asyncio.create_task(self._finish(order.id, need))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return _json({"status": "loading"}, 202)

    async def _finish(self, model_id: str, need_mb: int) -> None:
        await self.load_may_end.wait()
        if self.load_failure is not None:
            self.put(model_id, "failed", error=self.load_failure)
        elif self.really_needs_mb.get(model_id, 0) > self.memory_mb - sum(
            m.vram_used_mb or 0 for name, m in self.models.items() if name != model_id
        ):
            self.put(model_id, "failed", error="no more memory", error_code="out_of_memory")
        else:
            self.put(model_id, "loaded", vram_used_mb=max(need_mb, self.really_needs_mb.get(model_id, 0)))

    async def _defrag(self, request: Request) -> Response:
        if any(m.active_requests for m in self.models.values()):
            return _error(409, code="in_use", message="the devices are in use")
        return _json({"before": [], "after": []})

    async def _unload(self, request: Request) -> Response:
        order = msgspec.json.decode(await request.body(), type=UnloadRequest)
        self.unloads.append(order)
        info = self.models[order.id]
        if info.active_requests and order.drain_s > 1:
            self.put(order.id, "unloading", vram_used_mb=info.vram_used_mb, active_requests=info.active_requests)
            until = time.monotonic() + order.drain_s
            while self.models[order.id].active_requests and time.monotonic() < until:
                await asyncio.sleep(0.01)
            info = self.models[order.id]
        if info.active_requests and not order.force:
            told = {"active_requests": info.active_requests}
            return _error(409, code="model_in_use", message=f"{order.id} is in use", **told)
        self.put(order.id, "unloaded")
        return _json({"status": "unloaded"})


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _error(status: int, **error: Any) -> Response:
    return _json({"error": {"type": "invalid_request_error", "param": None, **error}}, status)


@asynccontextmanager
async def neurons(*fakes: FakeNeuron) -> AsyncIterator[None]:
    """Started, and gone at the end."""
    for fake in fakes:
        await fake.start()
    try:
        yield
    finally:
        for fake in fakes:
            fake.hanging.clear()
            await fake.die()
