"""The relay's Director on a node: a request gets a seat at a loaded model, and the harness looks over its text.

Everything a request takes is in its Seat, which goes back in `released`; what it was is told in `done`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Final

from helexa.core import logs
from helexa.core.dialects.neuron_request import dropped_line
from helexa.core.errors import HelexaError, Overloaded
from helexa.core.relay.contract import Exchange, Route
from helexa.core.request_log import RequestLog
from helexa.neuron.admission import Seat
from helexa.neuron.guard import Guard
from helexa.neuron.image_fetch import ImageFetcher
from helexa.neuron.metrics import OTHER, Metrics
from helexa.neuron.models import Models

_log = logs.get("neuron.director")
STARTING: Final = "The node is starting and still looks at its devices; try again in a second."


class NodeDirector:
    """models: set by the daemon once it knows its devices; until then requests are told to try again."""

    def __init__(
        self,
        guard: Guard,
        metrics: Metrics,
        request_log: RequestLog,
        *,
        stall_s: float,
        images: ImageFetcher | None = None,
    ) -> None:
        self.models: Models | None = None
        self._images = images
        self._guard = guard
        self._metrics = metrics
        self._request_log = request_log
        self._stall_s = stall_s

    # HOT, once per request: a look for two headers, and what admission and the session's look at the body cost.
    def route(self, exchange: Exchange) -> Route | Awaitable[Route]:
        if self._guard.has_token:
            self._guard.check_token(exchange.header("authorization"))
        self._guard.check_host(exchange.header("host"))
        if self.models is None:
            raise Overloaded(STARTING, retry_after_s=1)
        if self._images is not None and self._images.wants(exchange.body):
            return self._with_images(exchange, self._images, self.models)
        return self._admit(exchange, self.models)

    async def _with_images(self, exchange: Exchange, images: ImageFetcher, models: Models) -> Route:
        """Before it has a seat, which others can use meanwhile."""
        exchange.body = await images.into(exchange.body)
        route = self._admit(exchange, models)
        return route if isinstance(route, Route) else await route

    def _admit(self, exchange: Exchange, models: Models) -> Route | Awaitable[Route]:
        seat = models.admit(exchange)
        if isinstance(seat, Seat):
            return _seated(exchange, seat)
        return _when_seated(exchange, seat)

    def progress(self, exchange: Exchange) -> bytes | None:
        return None

    def refused(self, exchange: Exchange, route: Route, status: int, body: bytes) -> HelexaError | None:
        seat: Seat = exchange.state
        return seat.session.refusal(exchange, status, body)

    def failed(self, exchange: Exchange, route: Route, error: HelexaError, *, mid_stream: bool) -> None:
        seat: Seat = exchange.state
        _log.warning(
            "the host failed a request",
            request_id=exchange.request_id,
            model=seat.model_id,
            error=error.message,
            mid_stream=mid_stream,
        )

    def released(self, exchange: Exchange, route: Route) -> None:
        seat: Seat = exchange.state
        seat.release()

    def done(self, exchange: Exchange) -> None:
        seat: Seat | None = exchange.state
        model = OTHER if seat is None else seat.model_id
        self._metrics.count(model, exchange)
        self._request_log.add(exchange)

    def is_stalled(self, exchange: Exchange, route: Route, silent_s: float) -> bool:
        seat: Seat = exchange.state
        return time.monotonic() - seat.host_progress() >= self._stall_s


def _seated(exchange: Exchange, seat: Seat) -> Route:
    exchange.state = seat
    try:
        prepared = seat.session.prepare(exchange)
    except BaseException:
        seat.release()
        raise
    exchange.headers_back = dropped_line(prepared.dropped)
    return Route(
        upstream=seat.upstream,
        body=prepared.body,
        mend=prepared.mend,
        first_event=prepared.first_event,
        content_type=prepared.content_type,
        cut_progress=prepared.cut_progress,
        stop_reason=exchange.endpoint.generates,
    )


async def _when_seated(exchange: Exchange, seat: Awaitable[Seat]) -> Route:
    return _seated(exchange, await seat)
