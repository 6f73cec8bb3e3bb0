"""The daemon as a whole: its parts put together, begun, drained and ended.

It binds first and looks at the devices then (a driver may take its time, or hang): whoever asks meanwhile hears
"starting". SIGTERM or SIGINT begins the drain, a second one cuts it short; either way hosts end with the daemon.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from helexa.core import logs
from helexa.core.addresses import is_loopback
from helexa.core.config import NeuronSettings
from helexa.core.errors import Dialect, ShuttingDown
from helexa.core.relay.contract import Endpoint
from helexa.core.relay.server import Server
from helexa.core.request_log import RequestLog
from helexa.neuron.app import ControlPlane, Node
from helexa.neuron.director import NodeDirector
from helexa.neuron.discovery import Probe, discover
from helexa.neuron.events import Hub
from helexa.neuron.guard import Guard
from helexa.neuron.harness import KNOWN, formats_of, open_harness
from helexa.neuron.harness.base import Harness
from helexa.neuron.image_fetch import ImageFetcher
from helexa.neuron.metrics import Metrics
from helexa.neuron.models import Models
from helexa.neuron.store import Store

_log = logs.get("neuron")

ENDPOINTS: Final = (
    Endpoint("/v1/chat/completions", Dialect.OPENAI, "/v1/chat/completions"),
    Endpoint("/v1/completions", Dialect.OPENAI, "/v1/completions"),
    Endpoint("/v1/embeddings", Dialect.OPENAI, "/v1/embeddings", generates=False),
    Endpoint("/v1/rerank", Dialect.OPENAI, "/v1/rerank", generates=False),
)
END_S: Final = 30.0  # hosts get 10 s at most, side by side
EXIT_GRACE_S: Final = 5.0


class CannotListen(Exception):
    """The port cannot be had. The command line tells the way out."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Neuron:
    """One daemon. Everything but `stop` is called from one loop."""

    def __init__(self, settings: NeuronSettings, harnesses: Mapping[str, Harness]) -> None:
        self.settings = settings
        self.address: tuple[str, int] | None = None
        self._harnesses = harnesses
        self._node: Node | None = None
        self._probe: Probe | None = None
        guard = Guard(settings.token, [settings.host, *settings.allowed_hosts])
        self._hub = Hub(self._snapshot)
        self._metrics = Metrics(
            models=lambda: self._node.models.listing() if self._node else [],
            devices=lambda: self._node.discovery.devices if self._node else [],
            health=lambda: self._node.models.device_health() if self._node else [],
            kv=lambda: self._node.models.kv_figures() if self._node else None,
        )
        self._request_log = RequestLog(_to_stderr, as_json=logs.writes_json(), now=time.time)
        self._images = ImageFetcher() if settings.fetch_images else None
        self._director = NodeDirector(
            guard, self._metrics, self._request_log, stall_s=settings.timeouts.stall_s, images=self._images
        )
        self._plane = ControlPlane(guard=guard, hub=self._hub, metrics=self._metrics, harnesses=harnesses)
        self._server = Server(
            director=self._director,
            endpoints=ENDPOINTS,
            app=self._plane,
            timeouts=settings.timeouts,
            limits=settings.limits,
            body_limit_mb=settings.body_limit_mb,
            inside=True,
        )
        self._server.on_tick.append(self._request_log.flush)
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

    async def serve(self) -> None:
        """Until a signal or `stop`. Raises CannotListen."""
        loop = asyncio.get_running_loop()
        try:
            self.address = await self._server.listen(self.settings.host, self.settings.port)
        except OSError as err:
            raise CannotListen(err) from err
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        _log.info("listening", url=url_of(*self.address))
        if self.settings.token is None and not is_loopback(self.address[0]):
            _log.warning("anybody in this network can use this node: set `token` in neuron.toml to refuse strangers")
        starting = asyncio.create_task(self._start())
        waiting = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()  # a start that failed ends the daemon with its reason
            await waiting
            await self._drain()
        finally:
            waiting.cancel()
            starting.cancel()
            await asyncio.wait({starting})
            await self._end()

    def stop(self) -> None:
        """Begin the drain; called again, cut it short."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def _start(self) -> None:
        settings = self.settings
        probe = self._probe = await asyncio.to_thread(discover)
        usable = await asyncio.to_thread(self._usable_harnesses)
        store = Store(
            models_dir=None if settings.models_dir is None else Path(settings.models_dir),
            allowed_roots=[Path(root) for root in settings.allowed_roots],
            allow_downloads=settings.allow_downloads,
            gguf_owners=settings.gguf_owners,
            formats=formats_of(self._harnesses.values()),
        )
        models = Models(settings, harnesses=self._harnesses, probe=probe, store=store, publish=self._publish)
        discovery = msgspec.structs.replace(probe.discovery(), harnesses=usable, isolation=settings.isolation)
        self._node = Node(models, store, discovery)
        await models.start()
        self._plane.node, self._director.models = self._node, models  # a listing before would have been empty
        gc.collect()
        gc.freeze()  # what lives now lives as long as the daemon: no collection need look at it again
        _log.info("ready", devices=[device.name for device in discovery.devices], harnesses=usable)

    def _usable_harnesses(self) -> list[str]:
        usable = []
        for name, harness in self._harnesses.items():
            if reason := harness.why_not():
                _log.warning("a harness cannot run here", harness=name, reason=reason)
            else:
                usable.append(name)
        return usable

    def _publish(self, kind: str, body: dict[str, Any]) -> None:
        if kind == "model":
            self._metrics.saw_model(body)
        self._hub.publish(kind, body)

    def _snapshot(self) -> dict[str, Any]:
        assert self._node is not None  # nobody subscribes before
        return {
            "models": self._node.models.listing(),
            "devices": self._node.models.device_health(),
            "draining": self._plane.shutdown is not None,
        }

    async def _drain(self) -> None:
        drain_s = self.settings.drain_s
        running = self._server.inflight
        _log.info("draining", running=running, within_s=drain_s)
        shutdown = ShuttingDown(
            "This node is shutting down and takes no new requests; ask again in a moment, or another node.",
            retry_after_s=max(1, min(math.ceil(drain_s), 30)),
        )
        self._plane.shutdown = shutdown
        self._server.stop_accepting(shutdown)
        if self._node is not None:
            self._hub.publish("draining", {"draining": True})
            self._node.models.close_admission()
        await self._unless_hurried(self._server.drain(drain_s))

    async def _unless_hurried(self, work: Awaitable[Any]) -> None:
        working = asyncio.ensure_future(work)
        hurried = asyncio.create_task(self._hurry.wait())
        try:
            await asyncio.wait({working, hurried}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            hurried.cancel()

    async def _end(self) -> None:
        # An engine in this process that hangs with the interpreter in its hands can be ended by nothing else.
        faulthandler.dump_traceback_later(END_S, exit=True)
        if self._node is not None:
            await self._node.models.stop(keep=not self._hurry.is_set())
        self._hub.close()
        if self._images is not None:
            self._images.close()
        await self._server.close()
        self._request_log.flush()
        if self._probe is not None:
            self._probe.close()
        faulthandler.cancel_dump_traceback_later()
        _log.info("stopped")


def build(settings: NeuronSettings, harnesses: Mapping[str, Harness] | None = None) -> Neuron:
    """harnesses: in place of those there are."""
    return Neuron(settings, harnesses or {name: open_harness(name) for name in KNOWN})


def run(settings: NeuronSettings, harnesses: Mapping[str, Harness] | None = None) -> None:
    """The whole life of `neuron serve`. Raises CannotListen."""
    import uvloop

    async def main() -> None:
        code = 1
        try:
            await build(settings, harnesses).serve()
            code = 0
        finally:
            # A thread that is stuck in a driver's call cannot be ended, and would keep the process for ever.
            last = threading.Timer(EXIT_GRACE_S, os._exit, (code,))
            last.daemon = True
            last.start()

    uvloop.run(main())


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _to_stderr(lines: str) -> None:
    sys.stderr.write(lines)
    sys.stderr.flush()
