"""The gateway as one process: its parts put together, its start and its end."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helexa import __version__
from helexa.core import logs
from helexa.core.addresses import is_loopback
from helexa.core.catalogue import Catalogue
from helexa.core.config import CortexSettings, Responses, Trace, split_listen
from helexa.core.dialects.neuron_request import Options
from helexa.core.errors import Dialect, ShuttingDown
from helexa.core.relay.contract import Endpoint
from helexa.core.relay.server import Server
from helexa.core.request_log import RequestLog
from helexa.cortex import responses_api
from helexa.cortex.control import ControlPlane, metrics_response
from helexa.cortex.director import CortexDirector
from helexa.cortex.fleet import Fleet
from helexa.cortex.loader import Loader
from helexa.cortex.loads import LoadRecord
from helexa.cortex.metrics import Metrics
from helexa.cortex.poller import Poller
from helexa.cortex.reload import Files, Read, Reloader
from helexa.cortex.response_store import MemoryStore, ResponseStore
from helexa.cortex.trace_recorder import TraceRecorder
from helexa.cortex.translated import Setup

log = logs.get("cortex")

ENDPOINTS: Final = (
    Endpoint("/v1/chat/completions", Dialect.OPENAI, "/v1/chat/completions"),
    Endpoint("/v1/completions", Dialect.OPENAI, "/v1/completions"),
    Endpoint("/v1/embeddings", Dialect.OPENAI, "/v1/embeddings", generates=False),
    Endpoint("/v1/rerank", Dialect.OPENAI, "/v1/rerank", generates=False),
    Endpoint("/v1/responses", Dialect.OPENAI, "/v1/chat/completions"),
    Endpoint("/v1/responses/input_tokens", Dialect.OPENAI, "/v1/tokens/count", generates=False),
    Endpoint("/v1/messages", Dialect.ANTHROPIC, "/v1/chat/completions"),
    Endpoint("/api/chat", Dialect.OLLAMA, "/v1/chat/completions", streams=True),
    Endpoint("/api/generate", Dialect.OLLAMA, "/v1/chat/completions", streams=True),
    Endpoint("/api/embed", Dialect.OLLAMA, "/v1/embeddings", generates=False),
    Endpoint("/api/embeddings", Dialect.OLLAMA, "/v1/embeddings", generates=False),
    Endpoint("/v1/messages/count_tokens", Dialect.ANTHROPIC, "/v1/tokens/count", generates=False),
)


class CannotListen(Exception):
    """An address could not be had; str() is the whole message for the user."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """What was really bound, which matters for port 0."""

    api: str
    metrics: str


class Cortex:
    """One gateway. `start` and `stop` for those who have a loop, `serve` for the program."""

    def __init__(self, read: Read, files: Files) -> None:
        settings, catalogue = read.settings, read.catalogue
        self.settings = settings
        self._has_files = files.config is not None
        self.fleet = Fleet(settings, catalogue)
        self.loader = Loader(self.fleet, settings)
        self.poller = Poller(self.fleet, settings)
        self.metrics = Metrics()
        self.request_log = RequestLog(_to_stderr, as_json=logs.writes_json(), now=time.time)
        self.loader.on_load.append(self._loaded)
        self._warnings = warnings_about(settings)
        self.reloader = Reloader(files, settings, read.catalogue_path, self._reconfigure)
        gateway = settings.gateway
        self.responses = _response_store(settings.responses)
        self.control = ControlPlane(
            self.fleet,
            self.loader,
            files=self.reloader.standing,
            cors_origins=gateway.cors_origins,
            allowed_hosts=gateway.allowed_hosts,
            metrics=self._metrics_text if gateway.metrics_on_api else None,
            warnings=self._warnings,
            relayed=[endpoint.path for endpoint in ENDPOINTS],
            more_routes=responses_api.routes(self.responses),
        )
        self.trace = _trace_recorder(settings.trace)
        director = CortexDirector(
            self.fleet,
            self.loader,
            self.metrics,
            self.request_log,
            wait_s=settings.loading.wait_s,
            admission=self.loader.admission,
            clock=time.monotonic,
            setup=Setup(
                Options(
                    keep_changing_blocks=settings.dialects.keep_changing_blocks,
                    refuse_hosted_tools=settings.dialects.hosted_tools == "refuse",
                ),
                self.responses,
            ),
            trace=self.trace,
        )
        self.server = Server(
            director=director,
            endpoints=ENDPOINTS,
            app=self.control,
            timeouts=settings.timeouts,
            limits=settings.limits,
            body_limit_mb=gateway.body_limit_mb,
            cors_origins=gateway.cors_origins,
        )
        self.server.on_tick.append(self.request_log.flush)
        if self.trace is not None:
            self.server.on_tick.append(self.trace.flush)
        self.metrics_server = Server(director=None, app=_metrics_app(self._metrics_text))

    async def start(self) -> Addresses:
        """Polling, and then listening: the first request finds the fleet known. Raises CannotListen."""
        gateway = self.settings.gateway
        await self.poller.start()  # half a poll interval at most
        try:
            api = await _listen(self.server, gateway.listen, "--listen, or [gateway] listen")
            metrics = await _listen(self.metrics_server, gateway.metrics_listen, "[gateway] metrics_listen")
        except CannotListen:
            await self.server.close()
            await self.poller.stop()
            raise
        log.info(
            "listening",
            url=f"http://{api}",
            metrics=metrics,
            version=__version__,
            nodes=len(self.fleet.nodes),
            models=len(self.fleet.profiles),
        )
        for warning in self._warnings:
            log.warning(warning)
        self.loader.start()
        self.reloader.start()
        return Addresses(api, metrics)

    async def stop(self, *, drain_s: float) -> int:
        """Running requests get `drain_s`; new ones, and those that wait for a load, a 503. Returns how many had to be
        cut."""
        error = ShuttingDown("The gateway is shutting down; ask again in a moment, or another one", retry_after_s=5)
        self.server.stop_accepting(error)
        self.control.shutdown = error
        await self.reloader.stop()
        await self.control.close()
        await self.loader.stop()
        cut = await self.server.drain(drain_s)
        await self.poller.stop()
        await self.server.close()
        await self.metrics_server.close()
        self.fleet.close()
        self.responses.close()
        self.request_log.flush()
        if self.trace is not None:
            await asyncio.to_thread(self.trace.close)
        return cut

    async def serve(self) -> None:
        """Until SIGTERM or SIGINT; a second signal ends the drain."""
        loop = asyncio.get_running_loop()
        signals: asyncio.Queue[str] = asyncio.Queue()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, signals.put_nowait, sig.name)
        if self._has_files:
            had_terminal = os.isatty(0)

            def hung_up() -> None:
                """The word to read the files again; or that of a terminal that was closed, which means the end."""
                if had_terminal and not os.isatty(0):
                    signals.put_nowait("SIGHUP")
                else:
                    self.reloader.at_once()

            loop.add_signal_handler(signal.SIGHUP, hung_up)
        await self.start()
        # What the start made stays; the collector need not look at it again.
        gc.collect()
        gc.freeze()
        reason = await signals.get()
        log.info("shutting down", signal=reason, inflight=self.server.inflight)
        draining = asyncio.create_task(self.stop(drain_s=self.settings.drain_s))
        again = asyncio.create_task(signals.get())
        await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
        if draining.done():
            again.cancel()
            log.info("stopped", cut=draining.result())
        else:
            log.warning("stopped at once by a second signal", inflight=self.server.inflight)
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
            self.request_log.flush()

    def _reconfigure(self, read: Read) -> list[str]:
        changed = self.fleet.reconfigure(read.settings.neurons, read.catalogue)
        self._warnings[:] = warnings_about(msgspec.structs.replace(self.settings, neurons=read.settings.neurons))
        self.poller.follow()
        self.loader.reconfigured()
        return changed

    def _loaded(self, record: LoadRecord) -> None:
        if record.error is None:
            self.metrics.loaded(record.model, record.node, record.seconds)

    def _metrics_text(self) -> bytes:
        return self.metrics.render({node.name: node.state != "down" for node in self.fleet.nodes.values()})


def build(settings: CortexSettings, catalogue: Catalogue, catalogue_path: Path | None = None) -> Cortex:
    """One that reads no file again."""
    return Cortex(Read(settings, catalogue, catalogue_path), Files(None, {}))


def warnings_about(settings: CortexSettings) -> list[str]:
    """What an operator should know about settings that are allowed; `cortex status` repeats it."""
    host, port = split_listen(settings.gateway.listen)
    said = []
    if not is_loopback(host):
        said.append(
            f"Everyone who can reach {host}:{port} can use this gateway: it listens beyond loopback, and asks for no "
            "keys."
        )
    if not settings.neurons:
        said.append("There is no node to ask: name them under [[neurons]] in cortex.toml.")
    return said


def _response_store(kept: Responses) -> ResponseStore:
    size, age_s = kept.store_mb << 20, kept.store_age_s
    if kept.path is None:
        return MemoryStore(max_bytes=size, age_s=age_s, clock=time.monotonic)
    from helexa.cortex.response_file import FileStore  # SQLite, for those who want it

    return FileStore(Path(kept.path), max_bytes=size, age_s=age_s, clock=time.time)


def _trace_recorder(kept: Trace) -> TraceRecorder | None:
    if kept.path is None:
        return None
    return TraceRecorder(Path(kept.path), max_bytes=kept.max_mb << 20, wall=time.time, clock=time.monotonic)


async def _listen(server: Server, listen: str, setting: str) -> str:
    host, port = split_listen(listen)
    try:
        bound_host, bound_port = await server.listen(host, port)
    except OSError as err:
        why = "is taken" if err.errno == errno.EADDRINUSE else f"cannot be had ({err.strerror or err})"
        raise CannotListen(f"{listen} {why}; choose another with {setting}") from err
    return f"[{bound_host}]:{bound_port}" if ":" in bound_host else f"{bound_host}:{bound_port}"


def _metrics_app(text: Callable[[], bytes]) -> Starlette:
    async def scrape(request: Request) -> Response:
        return metrics_response(text())

    return Starlette(routes=[Route("/metrics", scrape)])


def _to_stderr(lines: str) -> None:
    stream = sys.stderr
    if stream is not None:
        stream.write(lines)
        stream.flush()
