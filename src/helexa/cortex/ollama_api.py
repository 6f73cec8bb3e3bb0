"""Ollama's listings, and its orders to a model store, which are a node's affair here. Routes of the control plane.

Requests for tokens and embeddings (/api/chat, /api/generate, /api/embed, /api/embeddings) are the relay's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helexa import __version__
from helexa.core import bodies
from helexa.core.dialects import ollama_models
from helexa.core.errors import BadRequest, NotImplementedYet
from helexa.core.lifecycle import ModelInfo
from helexa.cortex.fleet import Fleet
from helexa.cortex.listing import status_rank
from helexa.cortex.nodes import Node

_encode = msgspec.json.Encoder().encode

# Models come to a node, not to the gateway: what to do there instead.
_ELSEWHERE: Final = {
    "pull": "run `neuron pull REF` on a node, or name the model in models.toml and ask for it",
    "push": "nothing is published from here; the file is on the node that `cortex models` names",
    "create": "describe the model in models.toml (source, context, chat_template ...), or run `neuron pull REF`",
    "copy": "give the model an alias under [aliases] in models.toml",
    "delete": "run `neuron rm REF` on the node that has it",
    "blobs": "put the file into `models_dir` of a node, or run `neuron pull REF` there",
}


class _Show(msgspec.Struct):
    model: str | None = None
    name: str | None = None  # what `model` was once called
    verbose: bool | None = None


_show = msgspec.json.Decoder(_Show)


class OllamaApi:
    """Answers come from the fleet's view, in memory. wall: seconds since 1970; clock: the fleet's, monotonic."""

    def __init__(
        self, fleet: Fleet, *, wall: Callable[[], float] = time.time, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fleet = fleet
        self._wall = wall
        self._clock = clock
        self.routes = [
            Route("/api/version", self._version),
            Route("/api/tags", self._tags),
            Route("/api/ps", self._ps),
            Route("/api/show", self._show, methods=["POST"]),
            Route("/api/pull", _elsewhere, methods=["POST"]),
            Route("/api/push", _elsewhere, methods=["POST"]),
            Route("/api/create", _elsewhere, methods=["POST"]),
            Route("/api/copy", _elsewhere, methods=["POST"]),
            Route("/api/delete", _elsewhere, methods=["DELETE"]),
            Route("/api/blobs/{digest}", _elsewhere, methods=["HEAD", "POST"]),
        ]

    async def _version(self, request: Request) -> Response:
        return _json({"version": ollama_models.API_VERSION, "helexa": __version__})

    async def _tags(self, request: Request) -> Response:
        listed = [ollama_models.tag(entry, self._said(entry["id"])) for entry in self._fleet.entries()]
        return _json({"models": listed})

    async def _ps(self, request: Request) -> Response:
        listed = []
        for entry in self._fleet.entries():
            now = self._running(entry["id"])
            if now is not None:
                listed.append(ollama_models.running(entry, self._said(entry["id"]), now))
        return _json({"models": listed})

    async def _show(self, request: Request) -> Response:
        asked = bodies.decode(_show, await request.body())
        name = asked.model or asked.name
        if not name:
            raise BadRequest("`model` is missing; /api/tags lists what there is", param="model")
        model_id = self._fleet.resolve(name)
        return _json(ollama_models.show(self._fleet.entry(model_id), self._said(model_id)))

    def _said(self, model_id: str) -> list[ModelInfo]:
        said = [node.models[model_id] for node in self._fleet.where(model_id)]
        return sorted(said, key=lambda info: status_rank(info.status), reverse=True)

    def _running(self, model_id: str) -> ollama_models.Running | None:
        """None: loaded nowhere."""
        replicas = self._fleet.replicas(model_id)
        if not replicas:
            return None
        profile = self._fleet.profiles.get(model_id)
        size_mb = vram_mb = 0
        ends: list[float | None] = []
        now, wall = self._clock(), self._wall()
        for replica in replicas:
            size, vram = _memory(replica.node, replica.info)
            size_mb, vram_mb = size_mb + size, vram_mb + vram
            ttl_s = profile.ttl_s if profile is not None and replica.node.name not in profile.pinned_on else None
            used_at = now if replica.inflight else max(replica.last_used, replica.loaded_at) or now
            ends.append(None if ttl_s is None else wall + used_at + ttl_s - now)
        known = [end for end in ends if end is not None]
        return ollama_models.Running(size_mb, vram_mb, max(known) if len(known) == len(ends) else None)


def _memory(node: Node, info: ModelInfo) -> tuple[int, int]:
    """(MB in all, MB that are not in a CPU's memory)."""
    devices = node.discovery.devices if node.discovery is not None else ()
    cpus = {device.index for device in devices if device.kind == "cpu"}
    by_device = {held.device: held.used_mb for held in info.memory or ()}
    if not by_device:
        used = info.vram_used_mb or 0
        return used, 0 if cpus and len(cpus) == len(devices) else used
    return sum(by_device.values()), sum(mb for device, mb in by_device.items() if device not in cpus)


async def _elsewhere(request: Request) -> Response:
    path = request.url.path
    raise NotImplementedYet(f"{path} is not for a gateway: {_ELSEWHERE[path.split('/')[2]]}")


def _json(body: Any) -> Response:
    return Response(_encode(body), media_type="application/json")
