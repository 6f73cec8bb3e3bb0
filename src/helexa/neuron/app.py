"""The control plane of a node: every path of CONTRACTS but the inference plane, which the relay serves.

Handlers answer from memory, so that they do also while every device is busy; what takes time (loads, downloads) is
the work of Models, and runs on when its caller leaves. Errors are in our one envelope, whatever went wrong.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from helexa.core import logs, profile, version
from helexa.core.addresses import is_loopback
from helexa.core.bodies import decode
from helexa.core.discovery import Discovery, NodeHealth
from helexa.core.errors import (
    BadRequest,
    Conflict,
    Dialect,
    HelexaError,
    MethodNotAllowed,
    ModelLoading,
    ModelNotFound,
    NotFound,
    Overloaded,
    ShuttingDown,
    UnsupportedMedia,
    nearest,
    render,
)
from helexa.core.lifecycle import LoadRequest, ModelInfo, ModelStatus, UnloadRequest
from helexa.neuron.director import STARTING
from helexa.neuron.events import EventStream, Hub
from helexa.neuron.guard import Guard
from helexa.neuron.harness.base import Harness
from helexa.neuron.metrics import Metrics
from helexa.neuron.models import Models
from helexa.neuron.store import Store

T = TypeVar("T")
_log = logs.get("neuron")
_encode = msgspec.json.Encoder().encode
_load_request = msgspec.json.Decoder(LoadRequest)
_unload_request = msgspec.json.Decoder(UnloadRequest)


class _Count(msgspec.Struct):
    """What of a body to be counted the daemon itself reads. profile: how the model would be loaded, if it is not."""

    model: str | None = None
    profile: LoadRequest | None = None


_count = msgspec.json.Decoder(_Count)

# Before the devices are known, these tell that the process is well.
ALWAYS: Final = frozenset({"/health", "/version"})
COMING: Final = frozenset({ModelStatus.DOWNLOADING, ModelStatus.LOADING, ModelStatus.RECOVERING})


@dataclass(frozen=True, slots=True)
class Node:
    """What the daemon has once it knows its devices."""

    models: Models
    store: Store
    discovery: Discovery


class ControlPlane:
    """An ASGI application. node: set when the devices are known; shutdown: set when the drain begins."""

    def __init__(self, *, guard: Guard, hub: Hub, metrics: Metrics, harnesses: Mapping[str, Harness]) -> None:
        self.node: Node | None = None
        self.shutdown: ShuttingDown | None = None
        self._guard = guard
        self._hub = hub
        self._metrics = metrics
        self._harnesses = harnesses
        self._started = time.monotonic()
        self._since = int(time.time())
        routes = [
            Route("/discovery", self._discovery),
            Route("/health", self._health),
            Route("/version", self._version),
            Route("/models", self._models),
            Route("/models/estimate", self._estimate, methods=["POST"]),
            Route("/models/load", self._load, methods=["POST"]),
            Route("/models/unload", self._unload, methods=["POST"]),
            Route("/models/{model_id:path}/endpoint", self._endpoint),
            Route("/events", self._events),
            Route("/metrics", self._scrape),
            Route("/defrag", self._defrag, methods=["POST"]),
            Route("/v1/models", self._v1_models),
            Route("/v1/tokens/count", self._count_tokens, methods=["POST"]),
        ]
        self._paths = [route.path for route in routes]
        self._app = Starlette(
            routes=routes,
            exception_handlers={
                HelexaError: _on_error,
                HTTPException: self._on_http,
                ClientDisconnect: _on_gone,
                Exception: _on_crash,
            },
        )
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._admit(scope)
        except HelexaError as error:
            await _answer(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except ConnectionError:
            pass  # the caller left, and hears nothing anyway
        except Exception:  # `_on_crash` has told the caller
            request_id = scope["state"]["request_id"]
            _log.exception("a handler failed", method=scope["method"], path=scope["path"], request_id=request_id)

    def _admit(self, scope: Scope) -> None:
        """Refuses what may not come in. 1. the token; 2. the name we were called by; 3. a web page that manages."""
        headers = Headers(scope=scope)
        self._guard.check_token(headers.get("authorization"))
        self._guard.check_host(headers.get("host"))
        path: str = scope["path"]
        if not path.startswith("/v1/"):
            self._guard.check_origin(headers.get("origin"))
        if self.node is None and path not in ALWAYS:
            raise Overloaded(STARTING, retry_after_s=1)

    @property
    def _ready(self) -> Node:
        assert self.node is not None  # _admit lets nobody in before
        return self.node

    async def _discovery(self, request: Request) -> Response:
        return _json(self._ready.discovery.to_wire())

    async def _health(self, request: Request) -> Response:
        return _json(self.health())

    def health(self) -> NodeHealth:
        uptime_s = round(time.monotonic() - self._started, 3)
        if self.node is None:
            return NodeHealth(status="starting", uptime_secs=uptime_s)
        devices = self.node.models.device_health()
        status = "ok"
        if self.shutdown is not None:
            status = "draining"
        elif self.node.discovery.error is not None or any(device.error is not None for device in devices):
            status = "degraded"
        return NodeHealth(status=status, uptime_secs=uptime_s, devices=devices)

    async def _version(self, request: Request) -> Response:
        engines = {name: harness.engine_version() for name, harness in self._harnesses.items()}
        return _json({**version.describe(), "engines": {name: v for name, v in engines.items() if v is not None}})

    async def _models(self, request: Request) -> Response:
        return _json(self._ready.models.listing())

    async def _estimate(self, request: Request) -> Response:
        wanted = await self._profile(request)
        return _json((await self._ready.models.estimate(wanted)).to_wire())

    async def _load(self, request: Request) -> Response:
        wait = _flag(request, "wait")
        wanted = await self._profile(request)
        if self.shutdown is not None:
            raise self.shutdown
        status = await self._ready.models.load(wanted, wait=wait, local_caller=_is_local(request))
        return _json({"status": status}, 200 if status is ModelStatus.LOADED else 202)

    async def _unload(self, request: Request) -> Response:
        order = await _read(request, _unload_request)
        _need_id(order.id, order.model_id, order.model)
        if order.drain_s < 0:
            raise BadRequest(f"drain_s is {order.drain_s}; use seconds, 0 or more", param="drain_s")
        await self._ready.models.unload(order)
        return _json({"status": ModelStatus.UNLOADED})

    async def _endpoint(self, request: Request) -> Response:
        model_id: str = request.path_params["model_id"]  # percent-decoded once, by the server
        info = self._ready.models.info(model_id)
        if info is None:
            raise self._unknown(model_id)
        if info.status in COMING:
            raise ModelLoading(f"{model_id} is {info.status} here; try again in 5 s")
        if info.status != ModelStatus.LOADED:
            raise Conflict(f"{model_id} is {info.status} here; load it with POST /models/load", code="not_loaded")
        return _json({"url": f"http://{request.headers.get('host', 'localhost')}"})

    def _unknown(self, model_id: str) -> ModelNotFound:
        near = nearest(model_id, [info.id for info in self._ready.models.listing()])
        hint = f"; did you mean {' or '.join(near)}?" if near else "; GET /models lists what is"
        return ModelNotFound(f"{model_id!r} is not on this node{hint}", param="model")

    async def _events(self, request: Request) -> EventStream:
        return EventStream(self._hub)

    async def _scrape(self, request: Request) -> Response:
        text, media = self._metrics.render()
        return Response(text, headers={"content-type": media})

    async def _defrag(self, request: Request) -> Response:
        return _json(await self._ready.models.defrag())

    async def _v1_models(self, request: Request) -> Response:
        return _json(
            {"object": "list", "data": [_openai_entry(info, self._since) for info in self._ready.models.listing()]}
        )

    async def _count_tokens(self, request: Request) -> Response:
        body = await _json_body(request)
        asked = decode(_count, body)
        model = request.headers.get("x-helexa-model") or asked.model
        if not model:
            raise BadRequest("`model` is missing", param="model")
        if asked.profile is not None:
            self._check_profile(request, asked.profile)
        return _json({"input_tokens": await self._ready.models.count_tokens(model, body, asked.profile)})

    async def _profile(self, request: Request) -> LoadRequest:
        """The load request of this body, its paths checked against what this caller may name."""
        wanted = await _read(request, _load_request)
        self._check_profile(request, wanted)
        return wanted

    def _check_profile(self, request: Request, wanted: LoadRequest) -> None:
        _need_id(wanted.id, wanted.model_id, wanted.model)
        for fault in (*profile.id_faults(wanted.id, ("model_id",)), *profile.faults(wanted, ())):
            param = str(fault.key[0])
            raise BadRequest(f"{param} {fault.reason}", param=param)
        self._ready.store.check_request_allowed(wanted, local_caller=_is_local(request))

    async def _on_http(self, request: Request, error: Exception) -> Response:
        """Starlette's own refusals in our words."""
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 404:
            near = nearest(path, self._paths)
            hint = f"; did you mean {near[0]}?" if near else ""
            return _answer(NotFound(f"There is no {path} on a neuron{hint}"))
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            answer = _answer(MethodNotAllowed(f"{request.method} does not go with {path}; use {allowed}"))
            answer.headers["allow"] = allowed
            return answer
        return _answer(BadRequest(error.detail))


def _openai_entry(info: ModelInfo, created: int) -> dict[str, Any]:
    """A model as the openai SDK and llama.cpp's clients list it; what is unknown is left out."""
    entry: dict[str, Any] = {
        "id": info.id,
        "object": "model",
        "created": created,
        "owned_by": "helexa",
        "status": {"value": info.status},
    }
    context = info.limits.context if info.limits is not None else None
    meta = {
        "n_ctx": context,
        "n_ctx_train": info.n_ctx_train,
        "n_params": info.n_params,
        "size": info.size_bytes,
    }
    entry["max_model_len"] = context
    entry["meta"] = {key: value for key, value in meta.items() if value is not None} or None
    entry["capabilities"] = info.capabilities
    if info.capabilities is not None:
        inputs = ["text", "image"] if "vision" in info.capabilities else ["text"]
        entry["architecture"] = {"input_modalities": inputs, "output_modalities": ["text"]}
    return {key: value for key, value in entry.items() if value is not None}


async def _read(request: Request, decoder: msgspec.json.Decoder[T]) -> T:
    return decode(decoder, await _json_body(request))


async def _json_body(request: Request) -> bytes:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        found = f"is {media!r}" if media else "is missing"
        raise UnsupportedMedia(f"content-type {found}; send the body with `content-type: application/json`")
    return await request.body()


def _need_id(wanted: str, model_id: str, model: str | None) -> None:
    if not wanted:
        raise BadRequest("`model_id` is missing", param="model_id")
    if model_id and model is not None and model != model_id:
        raise BadRequest(f"`model_id` is {model_id!r} but `model` is {model!r}; send one of them", param="model")


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false").lower()
    if value not in ("", "true", "1", "false", "0"):
        raise BadRequest(f"?{name}={value} is neither true nor false", param=name)
    return value in ("", "true", "1")


def _is_local(request: Request) -> bool:
    return request.client is None or is_loopback(request.client.host)


def _json(body: Any, status: int = 200) -> Response:
    return Response(_encode(body), status, media_type="application/json")


def _answer(error: HelexaError) -> Response:
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = render(error, Dialect.OPENAI, "")
    return Response(body, error.status, headers=headers, media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HelexaError)
    return _answer(error)


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_crash(request: Request, error: Exception) -> Response:
    return _answer(HelexaError("This is a fault of helexa itself; the node's log has its traceback."))
