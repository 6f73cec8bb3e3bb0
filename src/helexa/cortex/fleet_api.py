"""The operator's part of the control plane, under /fleet: what the loader decided, and what it would decide.

Answers are made from memory, but that a plan may ask nodes what a model would take there.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helexa.core.errors import BadRequest
from helexa.cortex import decisions
from helexa.cortex.fleet import Fleet
from helexa.cortex.loader import Loader

_encode = msgspec.json.Encoder().encode


class FleetApi:
    def __init__(self, fleet: Fleet, loader: Loader) -> None:
        self._fleet = fleet
        self._loader = loader
        self.routes = [
            Route("/fleet/decisions", self._decisions),
            Route("/fleet/plan", self._plan),
        ]

    async def _decisions(self, request: Request) -> Response:
        last = self._loader.decisions.last(_count(request, "last", decisions.KEPT))
        return json_response({"decisions": last})

    async def _plan(self, request: Request) -> Response:
        name = request.query_params.get("model", "")
        if not name:
            raise BadRequest("?model= is missing; GET /v1/models lists what can be asked", param="model")
        return json_response(await self._loader.foresee(self._fleet.resolve(name)))


def json_response(body: Any, status: int = 200) -> Response:
    return Response(_encode(body), status, media_type="application/json")


def _count(request: Request, name: str, most: int) -> int:
    text = request.query_params.get(name, str(most))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= most:
        raise BadRequest(f"?{name}={text} must be a whole number from 1 to {most}", param=name)
    return int(text)
