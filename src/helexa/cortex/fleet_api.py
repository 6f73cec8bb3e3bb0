"""The operator's part of the control plane, under /fleet: what the loader decided, what it would decide, and
nodes that are set aside for a while.

Answers are made from memory, but that a plan may ask nodes what a model would take there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helexa.core import logs
from helexa.core.errors import BadRequest, NotFound, nearest
from helexa.cortex import decisions
from helexa.cortex.fleet import Fleet
from helexa.cortex.loader import Loader
from helexa.cortex.nodes import Node

_encode = msgspec.json.Encoder().encode


log = logs.get("cortex.control")


class FleetApi:
    """permit: raises where an order is not one to obey."""

    def __init__(self, fleet: Fleet, loader: Loader, *, permit: Callable[[Request], Awaitable[None]]) -> None:
        self._fleet = fleet
        self._loader = loader
        self._permit = permit
        self.routes = [
            Route("/fleet/decisions", self._decisions),
            Route("/fleet/plan", self._plan),
            Route("/fleet/nodes/{name}/drain", self._drain, methods=["POST"]),
            Route("/fleet/nodes/{name}/resume", self._resume, methods=["POST"]),
        ]

    async def _decisions(self, request: Request) -> Response:
        last = self._loader.decisions.last(_count(request, "last", decisions.KEPT))
        return json_response({"decisions": last})

    async def _plan(self, request: Request) -> Response:
        name = request.query_params.get("model", "")
        if not name:
            raise BadRequest("?model= is missing; GET /v1/models lists what can be asked", param="model")
        return json_response(await self._loader.foresight.of_first(self._fleet.candidates(name)))

    async def _drain(self, request: Request) -> Response:
        return await self._set_aside(request, True)

    async def _resume(self, request: Request) -> Response:
        return await self._set_aside(request, False)

    async def _set_aside(self, request: Request, aside: bool) -> Response:
        """Answers at once: what runs there may run for long. `running` says how much that is."""
        await self._permit(request)
        node = self._node(request.path_params["name"])
        client = request.client.host if request.client is not None else "unix"
        log.info("drain ordered" if aside else "resume ordered", node=node.name, client=client)
        self._fleet.set_aside(node, aside)
        running = sum(replica.inflight for replica in node.replicas.values())
        return json_response({"node": node.name, "state": node.state, "set_aside": aside, "running": running})

    def _node(self, name: str) -> Node:
        node = self._fleet.nodes.get(name)
        if node is None:
            near = nearest(name, list(self._fleet.nodes)) or list(self._fleet.nodes)[:5]
            hint = f"did you mean {near[0]}?" if nearest(name, near) else f"there is {', '.join(near) or 'none'}"
            raise NotFound(f"No node is called {name!r}; {hint}")
        return node


def json_response(body: Any, status: int = 200) -> Response:
    return Response(_encode(body), status, media_type="application/json")


def _count(request: Request, name: str, most: int) -> int:
    text = request.query_params.get(name, str(most))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= most:
        raise BadRequest(f"?{name}={text} must be a whole number from 1 to {most}", param=name)
    return int(text)
