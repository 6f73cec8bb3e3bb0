"""The gateway's answers to the relay: which node takes a request, whether to wait for a load, what a failure means.

Decisions are the router's and the swapper's; this module asks them, keeps what one request has tried, and counts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from functools import lru_cache
from itertools import count
from random import Random
from typing import Final

from helexa.core import logs
from helexa.core.dialects import node_errors
from helexa.core.errors import (
    BadRequest,
    ContextLengthExceeded,
    HelexaError,
    ModelLoading,
    ModelNotServable,
    ModelUnloading,
    Overloaded,
    ShuttingDown,
    UpstreamError,
    UpstreamTimeout,
)
from helexa.core.lifecycle import ModelStatus
from helexa.core.relay.contract import Exchange, Reply, Route
from helexa.core.request_log import RequestLog
from helexa.cortex import counting, prefixes, refusals, too_long
from helexa.cortex.admission import Admission
from helexa.cortex.fallbacks import Fallbacks
from helexa.cortex.fleet import Fleet
from helexa.cortex.loader import Loader
from helexa.cortex.metrics import OTHER, Metrics
from helexa.cortex.nodes import Replica
from helexa.cortex.prefixes import Prompt
from helexa.cortex.pursuit import NodeRoute, Pursuit, deadline_of, tell_all
from helexa.cortex.router import choose
from helexa.cortex.routing import Routing
from helexa.cortex.targets import Target, Targets, wrong_task
from helexa.cortex.trace_recorder import TraceRecorder
from helexa.cortex.translated import Setup
from helexa.cortex.translations import TRANSLATIONS

log = logs.get("cortex.director")

_CHAT: Final = "/v1/chat/completions"
_ENSURE_ATTEMPTS: Final = 3  # a load that is evicted before its waiter gets to it, three times over: give up


class CortexDirector:
    """core.relay.contract.Director for a fleet. wait_s: how long a request may wait for loads, all of them together.
    queue: how many may wait for a place at a model.
    clock: the loop's, which stamps the exchanges too."""

    def __init__(
        self,
        fleet: Fleet,
        loader: Loader,
        metrics: Metrics,
        request_log: RequestLog,
        *,
        wait_s: float,
        admission: Admission,
        clock: Callable[[], float],
        rng: Random | None = None,
        setup: Setup | None = None,
        trace: TraceRecorder | None = None,
    ) -> None:
        self._fleet = fleet
        self._loader = loader
        self._metrics = metrics
        self._log_request = request_log.add
        self._wait_s = wait_s
        self._clock = clock
        self._setup = setup or Setup()
        self._trace = trace
        self._rng = rng or Random()
        self._routing = Routing(self._rng, clock, metrics.routed)
        self._fallbacks = Fallbacks(loader.outlook, clock)
        self._admission = admission
        self._targets = Targets(fleet)
        self._target_of = self._targets.by_name.get
        self._waiting: Counter[str] = Counter()
        self._ids = count()
        fleet.on_change.append(self._view_changed)

    # -- the relay's questions ------------------------------------------------------------------------------------

    def route(self, exchange: Exchange) -> Route | Reply | Awaitable[Route | Reply]:
        """HOT for a loaded model: a dictionary look-up, the router's choice, one small object. Bench: bench/gateway.

        1. A name that nobody knows, or a task that is not the model's, is refused before anything is sent.
        2. A loaded replica that was not tried: there.
        3. All tried: a node that failed ends it with its error; nodes that asked to wait are waited for, and what a
           node had that shuts down is loaded elsewhere.
        4. Loaded nowhere: wait for a load. But tokens are counted without one (counting.py).

        Of an alias that lists several models, the first that can serve it in time; where that fails, the next.
        """
        pursuit: Pursuit | None = exchange.state
        if pursuit is None:
            target = self._target_of(exchange.model) or self._targets.make(exchange.model)
            pursuit = Pursuit(target)
            if target.fallbacks:
                target = self._first_of(exchange, pursuit, (target, *target.fallbacks))
            self._take_up(exchange, pursuit, target)
            if pursuit.translated is not None:
                reply = pursuit.translated.reply(exchange, is_loaded=False)
                if reply is not None:
                    exchange.headers_back = pursuit.headers_back
                    return reply
        if pursuit.counts:
            return self._count(exchange, pursuit)
        if pursuit.model.is_bounded:
            bounded = self._within_bounds(exchange, pursuit)
            if bounded is not None:
                return bounded
        else:
            replica = self._choose(exchange, pursuit, pursuit.model.replicas, exchange.tried)
            if replica is not None:
                return self._send(exchange, pursuit, replica)
        last = pursuit.last_error
        if last is not None and not isinstance(last, ModelLoading | ModelUnloading | ShuttingDown):
            if self._falls_back(exchange, pursuit, last):
                return self.route(exchange)
            tell_all(last, pursuit)
            raise last
        return self._wait(exchange, pursuit)

    def progress(self, exchange: Exchange) -> bytes | None:
        pursuit: Pursuit | None = exchange.state
        return self._loader.progress(pursuit.model.id) if pursuit is not None else None

    def refused(self, exchange: Exchange, route: Route, status: int, body: bytes) -> HelexaError | None:
        assert isinstance(route, NodeRoute)
        pursuit: Pursuit = exchange.state
        model, node = pursuit.model.id, route.replica.node.name
        judge = counting.judge if pursuit.counts else refusals.judge
        error = judge(model, node, status, body)
        code, message = refusals.code_and_message(body)
        if status >= 500 or error is not None:
            self._metrics.upstream_error(node, str(status))
            log.warning(
                "node refused", request_id=exchange.request_id, node=node, model=model, status=status, code=code,
                message=message or body[:500].decode("utf-8", "replace"),
            )  # fmt: skip
        if error is None and pursuit.translated is not None:
            return node_errors.from_answer(status, body, pursuit.translated.naming)
        if error is None:
            pursuit.passed_on = refusals.NodeSaid(code, message or f"{node} answered {status}")
            return None
        pursuit.last_error = error
        if pursuit.counts:
            return error
        if isinstance(error, ModelLoading | ModelUnloading):
            self._fleet.model_refused(route.replica, refusals.state_of(error))
        elif isinstance(error, UpstreamError):
            pursuit.broken.append(node)
        elif isinstance(error, ShuttingDown):
            self._fleet.saw_draining(route.replica.node)  # before its event, or the next poll, says so
        elif isinstance(error, Overloaded):
            others = choose(pursuit.model.replicas, [*exchange.tried, node], self._rng)
            if others is None and pursuit.translated is None and not pursuit.others:
                pursuit.passed_on = refusals.NodeSaid(code, error.message)
                return None  # nobody else to ask: the node's own words, its retry-after included
        return error

    def failed(self, exchange: Exchange, route: Route, error: HelexaError, *, mid_stream: bool) -> None:
        assert isinstance(route, NodeRoute)
        pursuit: Pursuit = exchange.state
        if error is pursuit.last_error:
            return  # the node answered, with a refusal: that was judged and counted in `refused`
        node = route.replica.node
        kind = "stall" if isinstance(error, UpstreamTimeout) else "stream" if mid_stream else "connect"
        self._metrics.upstream_error(node.name, kind)
        self._fleet.request_failed(node, error.message)
        pursuit.broken.append(node.name)
        pursuit.last_error = error

    def released(self, exchange: Exchange, route: Route) -> None:
        assert isinstance(route, NodeRoute)
        route.replica.end(self._clock())
        route.series.inflight -= 1
        if self._admission.lines:
            self._admission.changed()
        if exchange.timings is not None:
            route.replica.work.timed(exchange.timings)
        if route.ticket is not None:
            exchange.state.routed.ended(exchange, route.ticket)

    def done(self, exchange: Exchange) -> None:
        pursuit: Pursuit | None = exchange.state
        if pursuit is None:
            series = self._metrics.series(self._label(exchange.model), "")
        else:
            series = pursuit.series or self._metrics.series(pursuit.model.id, "")
            if pursuit.node is not None and exchange.t_first_byte and exchange.error is None:
                self._fleet.request_succeeded(pursuit.node)
            if pursuit.passed_on is not None and not exchange.client_gone:
                exchange.error = pursuit.passed_on
            if pursuit.translated is not None:
                pursuit.translated.over(exchange)
            if self._trace is not None and exchange.endpoint.upstream_path != "/v1/tokens/count":
                self._trace.add(exchange, pursuit.model.id, self._prompt_of(exchange, pursuit))
        self._metrics.record(exchange, series)
        self._log_request(exchange)

    def is_stalled(self, exchange: Exchange, route: Route, silent_s: float) -> bool:
        """A node that answers its polls and reports this model at work has its own watchdog over the host: slow, not
        stuck. Silence of a node that says nothing of its work, or has lost the request, is a stall."""
        assert isinstance(route, NodeRoute)
        node = route.replica.node
        info = node.models.get(route.replica.model_id)
        if node.state != "up" or info is None or info.parsed_status is not ModelStatus.LOADED:
            return True
        return not (info.active_requests or info.queued_requests)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _choose(
        self, exchange: Exchange, pursuit: Pursuit, replicas: list[Replica], tried: Collection[str]
    ) -> Replica | None:
        """HOT. A prompt is looked at only where there is a choice."""
        if len(replicas) < 2 or not exchange.endpoint.generates:
            return choose(replicas, tried, self._rng)
        if pursuit.routed is None:
            translated = pursuit.translated
            body = exchange.body if translated is None else translated.body("")
            pursuit.routed = self._routing.read(exchange, pursuit.model.id, body)
        return pursuit.routed.choose(replicas, tried)

    def _prompt_of(self, exchange: Exchange, pursuit: Pursuit) -> Prompt | None:
        """As the router has read it, or would have."""
        if pursuit.routed is not None:
            return pursuit.routed.prompt
        translated = pursuit.translated
        return prefixes.read(exchange.body if translated is None else translated.body(""), pursuit.model.id)

    def _send(self, exchange: Exchange, pursuit: Pursuit, replica: Replica) -> NodeRoute | Reply:
        translated = pursuit.translated
        exchange.headers_back = pursuit.headers_back
        path = body = None
        if translated is not None:
            reply = translated.reply(exchange, is_loaded=True)
            if reply is not None:
                replica.last_used = self._clock()
                return reply
            path, body = translated.ask(replica.info)
        ask = exchange.stream and not exchange.wants_usage and exchange.endpoint.generates and translated is None
        headers = _headers(replica.info.id, ask)
        series = pursuit.series = self._metrics.series(pursuit.model.id, replica.node.name)
        pursuit.node = replica.node
        replica.begin(self._clock())
        series.inflight += 1
        route = NodeRoute(
            replica.node.upstream,
            path=path,
            body=body,
            headers=headers,
            cut_usage=ask,
            replica=replica,
            series=series,
        )
        if pursuit.routed is not None:
            route.ticket = pursuit.routed.sent(exchange, replica)
        if translated is not None:
            route.mend = translated.answer(exchange)
            route.translates = route.mend is not None
            if route.translates:
                route.content_type = translated.content_type(exchange)
        return route

    def _count(self, exchange: Exchange, pursuit: Pursuit) -> Route | Reply | Awaitable[Route | Reply]:
        model = pursuit.model
        found = counting.choose(self._fleet, model.id, model.replicas, exchange.tried, self._rng)
        if found is None:
            error = pursuit.last_error or counting.nobody(model.id)
            if self._falls_back(exchange, pursuit, error):
                return self.route(exchange)
            tell_all(error, pursuit)
            raise error
        replica, profile = found
        route = self._send(exchange, pursuit, replica)
        if profile is not None and isinstance(route, Route) and route.body is not None:
            route.body = counting.with_profile(route.body, profile)
        return route

    # where an operator has set bounds

    def _within_bounds(self, exchange: Exchange, pursuit: Pursuit) -> Route | Reply | Awaitable[Route | Reply] | None:
        """None: no replica is left to try."""
        model_id = pursuit.model.id
        if choose(pursuit.model.replicas, exchange.tried, self._rng) is None:
            return None
        if model_id not in self._admission.lines:
            route = self._try(exchange, pursuit, exchange.tried)
            if route is not None:
                return route
        return self._wait(exchange, pursuit, for_a_place=True)

    def _try(self, exchange: Exchange, pursuit: Pursuit, tried: Collection[str]) -> NodeRoute | Reply | None:
        model_id = pursuit.model.id
        if not self._admission.takes(model_id):
            return None
        passed_over = [*tried, *self._admission.full_nodes(model_id)]
        replica = self._choose(exchange, pursuit, self._fleet.replicas(model_id), passed_over)
        if replica is None or not self._admission.takes(model_id, replica):
            return None
        return self._send(exchange, pursuit, replica)

    async def _in_turn(
        self, exchange: Exchange, pursuit: Pursuit, tried: Collection[str], *, has_waited: bool = False
    ) -> Route | Reply | None:
        """When there is a place. None: nothing is left to try, or loaded. Raises Overloaded."""
        model_id, deadline, route = pursuit.model.id, deadline_of(exchange, self._wait_s), None
        turn = self._admission.enter(model_id, exchange.client, has_waited=has_waited)
        try:
            while choose(self._fleet.replicas(model_id), tried, self._rng) is not None:
                turn.news.clear()
                if self._admission.is_first(turn):
                    route = self._try(exchange, pursuit, tried)
                    if route is not None:
                        return route
                async with asyncio.timeout(max(0.0, deadline - self._clock())):
                    await turn.news.wait()
            return None
        except TimeoutError:
            why = f"{model_id} had no place within the time that the request may wait"
            raise self._admission.overloaded(model_id, why) from None
        finally:
            self._admission.leave(turn, served=route is not None)

    # models by several names, and loads

    def _take_up(self, exchange: Exchange, pursuit: Pursuit, target: Target) -> None:
        """From now on the request is one for this model. HOT, once per request."""
        path = exchange.endpoint.path
        if path in target.wrong_paths:
            raise wrong_task(target, path)
        pursuit.model = target
        pursuit.routed = None
        exchange.state = pursuit
        exchange.headers_back = b""
        translate = TRANSLATIONS.get(path)
        if translate is not None:
            pursuit.translated = translate(exchange, target.context, self._setup)
            pursuit.counts = exchange.endpoint.upstream_path == counting.PATH
        pursuit.headers_back = exchange.headers_back + target.named

    def _first_of(self, exchange: Exchange, pursuit: Pursuit, options: tuple[Target, ...]) -> Target:
        """The model to begin with; what else may serve it is kept with the request."""
        fit = [option for option in options if exchange.endpoint.path not in option.wrong_paths] or list(options)
        first = self._fallbacks.choose(fit, deadline_of(exchange, self._wait_s) - self._clock()) or fit[0]
        pursuit.others = tuple(option for option in fit if option is not first)
        return first

    def _falls_back(self, exchange: Exchange, pursuit: Pursuit, error: HelexaError) -> bool:
        """Turns the request to another model that may serve it, if there is one; `error` is why the last could not.
        Once its time is over, only what is loaded is left."""
        is_too_long = isinstance(error, ContextLengthExceeded)
        if not pursuit.others or isinstance(error, ShuttingDown) or (isinstance(error, BadRequest) and not is_too_long):
            return False
        if not is_too_long:
            self._fallbacks.failed(pursuit.model.id, error)
        pursuit.reasons += (error.message,)
        left_s = deadline_of(exchange, self._wait_s) - self._clock()
        target = self._fallbacks.choose([o for o in pursuit.others if left_s > 0 or o.replicas], left_s)
        if target is None:
            return False
        log.info("another model serves it", request_id=exchange.request_id, model=target.id, reason=error.message)
        pursuit.others = tuple(other for other in pursuit.others if other is not target)
        pursuit.last_error = None
        exchange.tried[:] = pursuit.broken  # who could not serve that model may serve this one
        self._take_up(exchange, pursuit, target)
        return True

    async def _wait(self, exchange: Exchange, pursuit: Pursuit, *, for_a_place: bool = False) -> Route | Reply:
        """Until it is loaded; for_a_place: it is, and bounded."""
        while True:
            try:
                if for_a_place:
                    began = self._clock()
                    route = await self._in_turn(exchange, pursuit, exchange.tried)
                    self._metrics.waited(pursuit.model.id, self._clock() - began)
                    if route is not None:
                        return route
                return await self._wait_for_it(exchange, pursuit)
            except HelexaError as error:
                if not self._falls_back(exchange, pursuit, error):
                    tell_all(error, pursuit)
                    raise
            for_a_place = pursuit.model.is_bounded and bool(pursuit.model.replicas)
            if for_a_place:
                continue
            replica = self._choose(exchange, pursuit, pursuit.model.replicas, exchange.tried)
            if replica is not None:
                return self._send(exchange, pursuit, replica)

    async def _wait_for_it(self, exchange: Exchange, pursuit: Pursuit) -> Route | Reply:
        model_id = pursuit.model.id
        if not pursuit.model.replicas and exchange.endpoint.upstream_path == _CHAT:
            body = exchange.body if pursuit.translated is None else pursuit.translated.body("")
            await too_long.check(self._fleet, model_id, body, self._rng)
        began = self._clock()
        if not self._waiting[model_id] and not pursuit.model.replicas:
            self._metrics.cold_start(model_id)
        self._waiting[model_id] += 1
        try:
            for _ in range(_ENSURE_ATTEMPTS):
                latest = deadline_of(exchange, self._wait_s)
                await self._loader.ensure(
                    model_id, next(self._ids), latest, request_id=exchange.request_id, client=exchange.client
                )
                if pursuit.model.is_bounded:
                    route = await self._in_turn(exchange, pursuit, pursuit.broken, has_waited=True)
                    if route is not None:
                        return route
                # A node that said "loading" may be asked again; one that failed this request may not.
                replica = self._choose(exchange, pursuit, self._fleet.replicas(model_id), pursuit.broken)
                if replica is not None:
                    return self._send(exchange, pursuit, replica)
                if pursuit.broken and pursuit.last_error is not None:
                    raise pursuit.last_error
        finally:
            self._waiting[model_id] -= 1
            if not self._waiting[model_id]:
                del self._waiting[model_id]
            self._metrics.waited(model_id, self._clock() - began)
        raise pursuit.last_error or ModelLoading(f"{model_id} was loaded and evicted again before it could answer")

    def _label(self, name: str) -> str:
        """For a request refused before it had a target; cold."""
        try:
            return self._fleet.resolve(name) if name else OTHER
        except HelexaError:
            return OTHER

    def _view_changed(self, model_id: str | None) -> None:
        if model_id is not None:
            self._routing.view_changed(model_id, self._fleet)


@lru_cache(maxsize=4096)
def _headers(model: str, usage: bool) -> bytes:
    """The lines that name the model, as its node calls it, and ask for usage."""
    if not model.isprintable():  # a file's name may hold a line break, a header's value may not
        raise ModelNotServable(f"the name {model!r} has characters that no request can carry; rename the file")
    line = b"x-helexa-model: " + model.encode() + b"\r\n"
    return line + b"x-helexa-usage: 1\r\n" if usage else line
