"""The gateway's answers to the relay: which node takes a request, whether to wait for a load, what a failure means.

Decisions are the router's and the swapper's; this module asks them, keeps what one request has tried, and counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from functools import lru_cache
from itertools import count
from random import Random
from typing import Final

import msgspec

from helexa.core import logs
from helexa.core.dialects import node_errors
from helexa.core.errors import (
    BadRequest,
    HelexaError,
    ModelLoading,
    ModelNotServable,
    ModelUnloading,
    Overloaded,
    ShuttingDown,
    UpstreamError,
    UpstreamTimeout,
    WrongTask,
)
from helexa.core.lifecycle import ModelInfo, ModelStatus
from helexa.core.relay.contract import Exchange, Route
from helexa.core.request_log import RequestLog
from helexa.cortex import refusals
from helexa.cortex.fleet import Fleet, Node, Replica
from helexa.cortex.loader import Loader
from helexa.cortex.metrics import OTHER, Metrics, Series
from helexa.cortex.router import choose
from helexa.cortex.routing import Routed, Routing
from helexa.cortex.translations import TRANSLATIONS, Setup, Translated
from helexa.cortex.work import Ticket

log = logs.get("cortex.director")

_GENERATION: Final = frozenset({"chat", "completion"})
# What a model must be for to serve a path. A chat asked of a model without a chat template is the node's to judge.
_TASKS: Final[dict[str, frozenset[str]]] = {
    "/v1/chat/completions": _GENERATION,
    "/v1/messages": _GENERATION,
    "/v1/messages/count_tokens": _GENERATION,
    "/v1/responses": _GENERATION,
    "/v1/completions": _GENERATION,
    "/v1/embeddings": frozenset({"embed"}),
    "/v1/rerank": frozenset({"rerank"}),
}
_ALL_TASKS: Final = frozenset[str]().union(*_TASKS.values())
_DOES: Final = {"chat": "chats", "completion": "completes text", "embed": "makes embeddings", "rerank": "reranks"}
_TARGETS_KEPT: Final = 10_000
_ENSURE_ATTEMPTS: Final = 3  # a load that is evicted before its waiter gets to it, three times over: give up


class NodeRoute(Route, kw_only=True, eq=False):
    """A Route that remembers what `released` has to give back."""

    replica: Replica
    series: Series
    ticket: Ticket | None = None  # where there was a choice


class Pursuit(msgspec.Struct, eq=False):
    """What one request has been through; `Exchange.state`. A Struct for the same reason as Exchange."""

    model: Target
    translated: Translated | None = None  # the request, where nodes do not speak its dialect
    routed: Routed | None = None  # where the model has several replicas
    series: Series | None = None  # of the latest attempt, as is
    node: Node | None = None
    broken: list[str] = []  # nodes that failed it, as against those that asked to wait
    last_error: HelexaError | None = None
    passed_on: HelexaError | None = None  # a node's refusal that the client got as it was


class Target:
    """One model as requests need it, made once and kept until the fleet's view of it changes."""

    __slots__ = ("context", "id", "replicas", "wrong_paths")

    def __init__(
        self, model_id: str, replicas: list[Replica], tasks: frozenset[str], context: int | None = None
    ) -> None:
        self.id = model_id
        self.context = context  # tokens that a request may have, where known
        self.replicas = replicas  # the fleet's live list
        self.wrong_paths = {path: tasks for path, need in _TASKS.items() if tasks and not tasks & need}


class CortexDirector:
    """core.relay.contract.Director for a fleet. wait_s: how long a request may wait for loads, all of them together.
    clock: the loop's, which stamps the exchanges too."""

    def __init__(
        self,
        fleet: Fleet,
        loader: Loader,
        metrics: Metrics,
        request_log: RequestLog,
        *,
        wait_s: float,
        clock: Callable[[], float],
        rng: Random | None = None,
        setup: Setup | None = None,
    ) -> None:
        self._fleet = fleet
        self._loader = loader
        self._metrics = metrics
        self._log_request = request_log.add
        self._wait_s = wait_s
        self._clock = clock
        self._setup = setup or Setup()
        self._rng = rng or Random()
        self._routing = Routing(self._rng, clock, metrics.routed)
        self._targets: dict[str, Target] = {}  # by the name that clients use
        self._waiting: Counter[str] = Counter()
        self._ids = count()
        fleet.on_change.append(self._view_changed)

    # -- the relay's questions ------------------------------------------------------------------------------------

    def route(self, exchange: Exchange) -> Route | Awaitable[Route]:
        """HOT for a loaded model: a dictionary look-up, the router's choice, one small object. Bench: bench/gateway.

        1. A name that nobody knows, or a task that is not the model's, is refused before anything is sent.
        2. A loaded replica that was not tried: there.
        3. All tried: a node that failed ends it with its error; nodes that asked to wait are waited for.
        4. Loaded nowhere: wait for a load.
        """
        pursuit: Pursuit | None = exchange.state
        if pursuit is None:
            target = self._targets.get(exchange.model) or self._target(exchange.model)
            if exchange.endpoint.path in target.wrong_paths:
                raise self._wrong_task(exchange, target)
            exchange.state = pursuit = Pursuit(target)
            translate = TRANSLATIONS.get(exchange.endpoint.path)
            if translate is not None:
                pursuit.translated = translate(exchange, target.context, self._setup)
        replica = self._choose(exchange, pursuit, pursuit.model.replicas, exchange.tried)
        if replica is not None:
            return self._send(exchange, pursuit, replica)
        last = pursuit.last_error
        if last is not None and not isinstance(last, ModelLoading | ModelUnloading):
            raise last
        return self._wait(exchange, pursuit)

    def progress(self, exchange: Exchange) -> bytes | None:
        pursuit: Pursuit | None = exchange.state
        return self._loader.progress(pursuit.model.id) if pursuit is not None else None

    def refused(self, exchange: Exchange, route: Route, status: int, body: bytes) -> HelexaError | None:
        assert isinstance(route, NodeRoute)
        pursuit: Pursuit = exchange.state
        model, node = pursuit.model.id, route.replica.node.name
        error = refusals.judge(model, node, status, body)
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
        if isinstance(error, ModelLoading | ModelUnloading):
            self._fleet.model_refused(route.replica, refusals.state_of(error))
        elif isinstance(error, UpstreamError):
            pursuit.broken.append(node)
        elif isinstance(error, Overloaded | ShuttingDown):
            others = choose(pursuit.model.replicas, [*exchange.tried, node], self._rng)
            if others is None and pursuit.translated is None:
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

    def _send(self, exchange: Exchange, pursuit: Pursuit, replica: Replica) -> NodeRoute:
        translated = pursuit.translated
        ask = exchange.stream and not exchange.wants_usage and exchange.endpoint.generates and translated is None
        headers = _headers(replica.info.id, ask)
        series = pursuit.series = self._metrics.series(pursuit.model.id, replica.node.name)
        pursuit.node = replica.node
        replica.begin(self._clock())
        series.inflight += 1
        route = NodeRoute(
            replica.node.upstream,
            headers=headers,
            cut_usage=ask,
            replica=replica,
            series=series,
        )
        if pursuit.routed is not None:
            route.ticket = pursuit.routed.sent(exchange, replica)
        if translated is not None:
            route.body = translated.body(replica.info.id)
            route.mend = translated.answer(exchange)
            route.translates = route.mend is not None
            if route.translates and not exchange.stream:
                route.content_type = b"application/json"  # nodes are always asked for a stream
        return route

    async def _wait(self, exchange: Exchange, pursuit: Pursuit) -> Route:
        model_id = pursuit.model.id
        began = self._clock()
        if not self._waiting[model_id] and not pursuit.model.replicas:
            self._metrics.cold_start(model_id)
        self._waiting[model_id] += 1
        try:
            for _ in range(_ENSURE_ATTEMPTS):
                latest = exchange.t_start + self._wait_s
                await self._loader.ensure(model_id, next(self._ids), latest, request_id=exchange.request_id)
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

    def _target(self, name: str) -> Target:
        if not name:
            raise BadRequest('"model" is missing; GET /v1/models lists what is served', param="model")
        model_id = self._fleet.resolve(name)
        context = self._fleet.entry(model_id).get("max_model_len")
        target = Target(model_id, self._fleet.replicas(model_id), self._tasks(model_id), context)
        if len(self._targets) >= _TARGETS_KEPT:  # one model has many spellings, and a client may try them all
            self._targets.clear()
        self._targets[name] = target
        return target

    def _tasks(self, model_id: str) -> frozenset[str]:
        """What the model is known to be for; empty while nobody knows."""
        known: set[str] = set()
        for _, info in self._fleet.holders(model_id):
            if info is not None:
                known |= _tasks_of(info)
        return frozenset(known & _ALL_TASKS)

    def _wrong_task(self, exchange: Exchange, target: Target) -> WrongTask:
        does = " and ".join(sorted(_DOES[t] for t in target.wrong_paths[exchange.endpoint.path]))
        return WrongTask(
            f"{target.id} {does} and cannot serve {exchange.endpoint.path}; GET /v1/models lists each model's "
            f"capabilities",
            param="model",
        )

    def _label(self, name: str) -> str:
        """For a request refused before it had a target; cold."""
        try:
            return self._fleet.resolve(name) if name else OTHER
        except HelexaError:
            return OTHER

    def _view_changed(self, model_id: str | None) -> None:
        if model_id is not None:
            self._routing.view_changed(model_id, self._fleet)
        # Names are few and a Target costs microseconds: forgetting all is simpler than knowing which names lead here.
        self._targets.clear()


@lru_cache(maxsize=4096)
def _headers(model: str, usage: bool) -> bytes:
    """The lines that name the model, as its node calls it, and ask for usage."""
    if not model.isprintable():  # a file's name may hold a line break, a header's value may not
        raise ModelNotServable(f"the name {model!r} has characters that no request can carry; rename the file")
    line = b"x-helexa-model: " + model.encode() + b"\r\n"
    return line + b"x-helexa-usage: 1\r\n" if usage else line


def _tasks_of(info: ModelInfo) -> set[str]:
    return {*(info.capabilities or ()), *([info.task] if info.task else ())}
