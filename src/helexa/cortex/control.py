"""The control plane of the gateway: every path that is not the inference plane. An ASGI application.

Answers come from the fleet's view, in memory: none waits for a node, so none fails because a node does. The exceptions
are the operator's load and unload. No listing or probe wakes a model or touches its idle clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from helexa.core import bodies, logs, version
from helexa.core.addresses import is_own_host
from helexa.core.dialects import anthropic_models
from helexa.core.errors import (
    BadRequest,
    Dialect,
    HelexaError,
    LoadFailed,
    MethodNotAllowed,
    ModelNotFound,
    NoNode,
    NotFound,
    PermissionDenied,
    ShuttingDown,
    UnsupportedMedia,
    nearest,
    render,
    status_for,
)
from helexa.cortex.fleet import Fleet
from helexa.cortex.fleet_api import FleetApi
from helexa.cortex.fleet_api import json_response as _json
from helexa.cortex.front_page import front_page
from helexa.cortex.loader import Loader
from helexa.cortex.ollama_api import OllamaApi
from helexa.cortex.reload import Standing

log = logs.get("cortex.control")


class Order(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /models/load and /models/unload: llama.cpp's `model`, and what a fleet adds to it."""

    model: str
    node: str | None = None  # load: place it there; unload: only there
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0  # unload: what running requests get
    force: bool = False  # unload: cut what is running


_order = msgspec.json.Decoder(Order)


class ControlPlane:
    """metrics:  the exposition text, for /metrics on this port; None where only the metrics port has it
    files:    what was read, and what could not be
    warnings: sentences that `cortex status` repeats
    relayed:  paths whose POSTs the relay takes
    more_routes: of parts that have their own
    shutdown: set when the drain begins
    """

    def __init__(
        self,
        fleet: Fleet,
        loader: Loader,
        *,
        files: Standing,
        cors_origins: Sequence[str],
        allowed_hosts: Sequence[str],
        metrics: Callable[[], bytes] | None,
        warnings: list[str],
        relayed: Sequence[str],
        more_routes: Sequence[Route] = (),
    ) -> None:
        self.shutdown: ShuttingDown | None = None
        self._fleet = fleet
        self._loader = loader
        self._files = files
        self._cors_origins = frozenset(cors_origins)
        self._hosts = frozenset(host.lower().rstrip(".") for host in allowed_hosts)
        self._metrics = metrics
        self._warnings = warnings
        self._started = time.monotonic()
        self._loads: set[asyncio.Task[None]] = set()
        routes = [
            Route("/", self._front),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/version", self._version),
            Route("/fleet", self._view),
            *FleetApi(fleet, loader, permit=self._permit).routes,
            *OllamaApi(fleet).routes,
            Route("/v1/models", self._v1_models),
            Route("/v1/models/{model_id:path}", self._v1_model),
            Route("/models", self._v1_models),
            Route("/models/load", self._load, methods=["POST"]),
            Route("/models/unload", self._unload, methods=["POST"]),
            *(Route(path, _relayed, methods=["POST"]) for path in relayed),
            *more_routes,
        ]
        if metrics is not None:
            routes.append(Route("/metrics", self._scrape))
        self._paths = [route.path for route in routes]
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-helexa-model"],
        )
        self._app = Starlette(
            routes=routes,
            middleware=[cors] if cors_origins else [],
            exception_handlers={HelexaError: _on_error, HTTPException: self._on_http, ClientDisconnect: _on_gone},
        )
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def close(self) -> None:
        """Loads that nobody waits for end with the gateway; the nodes go on with them."""
        loads = list(self._loads)
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)

    async def _front(self, request: Request) -> Response:
        return Response(front_page(str(request.base_url).rstrip("/")), media_type="text/html")

    async def _health(self, request: Request) -> Response:
        """Is the process well. It is if it answers; what it works with is said beside."""
        return _json(
            {
                "status": "ok" if self.shutdown is None else "draining",
                "uptime_secs": round(time.monotonic() - self._started, 3),
                "nodes": {node.name: node.state for node in self._fleet.nodes.values()},
                "catalogue": {
                    "path": None if self._files.catalogue_path is None else str(self._files.catalogue_path),
                    "models": len(self._fleet.profiles),
                },
                **({"files_error": self._files.error} if self._files.error is not None else {}),
                **({"restart_for": self._files.restart_for} if self._files.restart_for else {}),
            }
        )

    async def _ready(self, request: Request) -> Response:
        if self.shutdown is not None:
            raise self.shutdown
        usable = [node.name for node in self._fleet.nodes.values() if node.state in ("up", "suspect")]
        if not usable:
            raise NoNode(f"Not ready: {self._fleet.why_no_node()}")
        still = self._loader.standing_still()
        if still:
            raise LoadFailed(f"Not ready: {'; '.join(still)}")
        return _json({"status": "ready", "nodes": usable})

    async def _version(self, request: Request) -> Response:
        return _json(version.describe())

    async def _view(self, request: Request) -> Response:
        return _json({**self._fleet.view(), "warnings": [*self._warnings, *self._files.warnings()]})

    async def _v1_models(self, request: Request) -> Response:
        """In Anthropic's shape for those who say that they speak it."""
        if "anthropic-version" in request.headers:
            return _json(anthropic_models.page(self._fleet.entries(), request.query_params))
        return _json({"object": "list", "data": self._fleet.entries()})

    async def _v1_model(self, request: Request) -> Response:
        """The id may contain slashes; an alias shows the model that it stands for."""
        found = self._fleet.entry(self._fleet.resolve(request.path_params["model_id"]))
        return _json(anthropic_models.model(found) if "anthropic-version" in request.headers else found)

    async def _scrape(self, request: Request) -> Response:
        assert self._metrics is not None
        return metrics_response(self._metrics())

    async def _load(self, request: Request) -> Response:
        """llama.cpp's router answers at once and loads on; ?wait=true blocks until it is there."""
        order = await self._read_order(request)
        try:
            model_id = self._fleet.resolve(order.model)
        except ModelNotFound:
            model_id = order.model  # the load API, unlike a request, may name what only the Hub has
        if order.node is not None:
            self._known_node(order.node)
        log.info("load ordered", model=model_id, node=order.node, client=_client(request))
        work = asyncio.create_task(self._loader.load(model_id, order.node), name=f"load {model_id}")
        self._loads.add(work)
        work.add_done_callback(self._load_ended)
        if _flag(request, "wait"):
            await asyncio.shield(work)  # a caller that leaves does not stop it
            return _json({"success": True, "status": "loaded"})
        # What can be refused is refused before the first wait for a node; that much is worth being told.
        await asyncio.wait([work], timeout=0.05)
        if work.done():
            work.result()
        return _json({"success": True, "status": "loaded" if work.done() else "loading"})

    async def _unload(self, request: Request) -> Response:
        order = await self._read_order(request)
        model_id = self._fleet.resolve(order.model)
        if order.node is not None:
            self._known_node(order.node)
        log.info("unload ordered", model=model_id, node=order.node, force=order.force, client=_client(request))
        await self._loader.unload(model_id, order.node, force=order.force, drain_s=order.drain_s)
        return _json({"success": True, "status": "unloaded"})

    def _load_ended(self, work: asyncio.Task[None]) -> None:
        self._loads.discard(work)
        if not work.cancelled():
            work.exception()  # looked at: the loader has logged it, and nobody may be waiting any more

    async def _read_order(self, request: Request) -> Order:
        await self._permit(request, has_body=True)
        return bodies.decode(_order, await request.body())

    async def _permit(self, request: Request, *, has_body: bool = False) -> None:
        """For orders. Refuses, in this order: 1. a name that is not ours (DNS rebinding); 2. a web page that was not
        allowed; 3. a body that a plain form could send; 4. anything while shutting down."""
        host = request.headers.get("host")
        if host is not None and not is_own_host(host, self._hosts):
            raise PermissionDenied(
                f"The Host {host!r} is not a name of this gateway. Use its address or a local name, or add the name to "
                "`allowed_hosts` under [gateway] in cortex.toml."
            )
        origin = request.headers.get("origin")
        if origin is not None and origin not in self._cors_origins and not _is_same_origin(origin, host):
            raise PermissionDenied(
                f"A web page ({origin}) may not give orders to this gateway. Programs: leave the Origin header out; "
                "pages of yours: add the origin to `cors_origins` under [gateway] in cortex.toml."
            )
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json" and (has_body or await request.body()):
            found = f"is {media!r}" if media else "is missing"
            raise UnsupportedMedia(f"content-type {found}; send the body with `content-type: application/json`")
        if self.shutdown is not None:
            raise self.shutdown

    def _known_node(self, name: str) -> None:
        if name not in self._fleet.nodes:
            near = nearest(name, list(self._fleet.nodes)) or list(self._fleet.nodes)[:5]
            hint = f"; there is {', '.join(near)}" if near else "; none is configured"
            raise BadRequest(f"No node is called {name!r}{hint}", param="node")

    async def _on_http(self, request: Request, error: Exception) -> Response:
        """Starlette's own refusals in our words."""
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 404:
            near = nearest(path, self._paths)
            hint = f"; did you mean {near[0]}?" if near else ""
            return answer(request, NotFound(f"There is no {path} here{hint}"))
        if error.status_code == 405:
            # Starlette joins a set; the same words in the same order read better.
            allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
            response = answer(request, MethodNotAllowed(f"{request.method} does not go with {path}; use {allowed}"))
            response.headers["allow"] = allowed
            return response
        return answer(request, BadRequest(error.detail))


def metrics_response(text: bytes) -> Response:
    return Response(text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})


async def _relayed(request: Request) -> Response:
    """Only for other methods to be told which one is right. A POST comes here if its path was written in an odd way."""
    raise NotFound(f"Write the path as it is: {request.url.path}")


def _client(request: Request) -> str:
    return request.client.host if request.client is not None else "unix"


def _is_same_origin(origin: str, host: str | None) -> bool:
    """A page that the gateway itself served."""
    return host is not None and origin.partition("://")[2].lower() == host.lower()


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false").lower()
    if value not in ("", "true", "1", "false", "0"):
        raise BadRequest(f"?{name}={value} is neither true nor false", param=name)
    return value in ("", "true", "1")


def answer(request: Request, error: HelexaError) -> Response:
    """The error in the dialect of the path."""
    request_id = getattr(request.state, "request_id", "")
    path = request.url.path
    is_anthropic = path.startswith("/v1/messages") or "anthropic-version" in request.headers
    dialect = Dialect.OLLAMA if path.startswith("/api/") else Dialect.ANTHROPIC if is_anthropic else Dialect.OPENAI
    headers = {"request-id": request_id} if dialect is Dialect.ANTHROPIC else {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    body = render(error, dialect, request_id)
    return Response(body, status_for(error, dialect), headers=headers, media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HelexaError)
    return answer(request, error)


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
