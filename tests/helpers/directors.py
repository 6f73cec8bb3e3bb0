"""A gateway's Director over a real Fleet; a scripted loader stands for the loads.

The real loader is in tests/integration/cortex.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import msgspec
from tests.helpers.fleets import answers, fleet, info

from helexa.core.catalogue import ModelProfile
from helexa.core.errors import Dialect, HelexaError
from helexa.core.relay.contract import Endpoint, Exchange, Route
from helexa.core.request_log import RequestLog
from helexa.cortex.admission import Admission
from helexa.cortex.director import CortexDirector, NodeRoute
from helexa.cortex.fallbacks import Outlook
from helexa.cortex.fleet import Fleet
from helexa.cortex.metrics import Metrics

CHAT = Endpoint("/v1/chat/completions", Dialect.OPENAI, "/v1/chat/completions")
EMBED = Endpoint("/v1/embeddings", Dialect.OPENAI, "/v1/embeddings", generates=False)
NAME = "Qwen/Qwen3-8B"


class ScriptedLoader:
    """ensure(): counts, then does what `then` says."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.asked: list[object] = []
        self.models: list[str] = []
        self.deadlines: list[float] = []
        self.outlooks: dict[str, Outlook] = {}
        self._news = asyncio.Event()
        self._then = then

    async def ensure(
        self, model_id: str, exchange_id: object, deadline: float, *, request_id: str, client: str
    ) -> None:
        self.asked.append(exchange_id)
        self.models.append(model_id)
        self.deadlines.append(deadline)
        self._news.set()
        outcome = self._then()
        if inspect.isawaitable(outcome):
            await outcome

    async def until_asked(self, times: int) -> None:
        while len(self.asked) < times:
            self._news.clear()
            await self._news.wait()

    def progress(self, model_id: str) -> bytes | None:
        return f"loading {model_id}".encode()

    def outlook(self, model_id: str) -> Outlook:
        return self.outlooks.get(model_id, Outlook(None))


class Bench:
    """A director and all that it works with."""

    def __init__(self, view: Fleet, then: Callable[[], object] = lambda: None) -> None:
        self.view = view
        self.loader = ScriptedLoader(then)
        self.metrics = Metrics()
        self.lines: list[str] = []
        self.log = RequestLog(self.lines.append, as_json=True, now=lambda: 0.0)
        self.now = 1000.0
        self.director = CortexDirector(
            view,
            self.loader,
            self.metrics,
            self.log,
            wait_s=600,
            admission=Admission(view, 256, lambda: self.now),
            clock=lambda: self.now,
            rng=Random(7),  # type: ignore[arg-type]
        )

    def sent(self, exchange: Exchange) -> NodeRoute:
        """The route of a request that needs no wait."""
        route = self.director.route(exchange)
        assert isinstance(route, NodeRoute)
        return route

    def fail(self, exchange: Exchange, route: Route, error: HelexaError, *, mid_stream: bool = False) -> None:
        """As the relay does."""
        self.director.failed(exchange, route, error, mid_stream=mid_stream)
        exchange.tried.append(route.upstream.name)
        self.director.released(exchange, route)

    def refuse(self, exchange: Exchange, route: Route, status: int, **error: Any) -> HelexaError | None:
        body = msgspec.json.encode({"error": {"message": "no", "type": "t", "param": None, **error}})
        return self.director.refused(exchange, route, status, body)

    def samples(self) -> dict[str, float]:
        lines = self.metrics.render({}).decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def exchange(model: str = NAME, endpoint: Endpoint = CHAT, **fields: Any) -> Exchange:
    made = Exchange(
        endpoint=endpoint, head=b"", body=b"{}", model=model, stream=False, wants_usage=False, gateway_usage=False,
        request_id="r1", client="127.0.0.1", t_start=1000.0,
    )  # fmt: skip
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def two_nodes(**fields: Any) -> Fleet:
    view = fleet("beast", "benjy", aliases={"small": NAME}, models=[ModelProfile(id=NAME)])
    for name in view.nodes:
        answers(view, name, info(NAME, **fields))
    return view


async def awaited(route: Route | Awaitable[Route]) -> Route:
    assert not isinstance(route, Route), "it was to wait"
    return await route
