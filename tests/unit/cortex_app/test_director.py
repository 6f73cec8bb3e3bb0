"""The gateway's Director over a real Fleet: where requests go, what a failure means, and that all is given back.

A scripted loader stands for the loads: the real one is in tests/integration/cortex.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import msgspec
import pytest
from tests.helpers.aio import run
from tests.helpers.fleets import answers, fleet, info

from helexa.core.catalogue import ModelProfile
from helexa.core.config import Bounds
from helexa.core.errors import (
    BadRequest,
    Dialect,
    HelexaError,
    LoadFailed,
    ModelLoading,
    ModelNotFound,
    ModelNotServable,
    NoNode,
    Overloaded,
    UpstreamError,
    UpstreamTimeout,
    WrongTask,
)
from helexa.core.lifecycle import ModelLimits
from helexa.core.relay.contract import Endpoint, Exchange, Route, Usage
from helexa.core.request_log import RequestLog
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


# where a request goes


def test_a_loaded_model_is_sent_at_once_with_the_name_its_node_knows() -> None:
    view = fleet("beast", models=[ModelProfile(id=NAME, source="Qwen/Qwen3-8B-GGUF", quant="Q4_K_M")])
    answers(view, "beast", info("Qwen/Qwen3-8B-GGUF:Q4_K_M"))
    assert Bench(view).sent(exchange()).headers == b"x-helexa-model: Qwen/Qwen3-8B-GGUF:Q4_K_M\r\n"


def test_an_alias_goes_to_its_model() -> None:
    assert b"x-helexa-model: Qwen/Qwen3-8B\r\n" in Bench(two_nodes()).sent(exchange("small")).headers


def test_requests_spread_over_the_replicas_by_what_is_in_flight() -> None:
    bench = Bench(two_nodes())
    assert {bench.sent(exchange()).upstream.name for _ in range(2)} == {"beast", "benjy"}


@pytest.mark.parametrize(
    ("stream", "wants", "endpoint", "asked"),
    [(True, False, CHAT, True), (True, True, CHAT, False), (False, False, CHAT, False), (True, False, EMBED, False)],
)
def test_usage_is_asked_for_and_cut_only_where_a_stream_would_not_tell_it(
    stream: bool, wants: bool, endpoint: Endpoint, asked: bool
) -> None:
    route = Bench(two_nodes()).sent(exchange(endpoint=endpoint, stream=stream, wants_usage=wants))
    assert (b"x-helexa-usage: 1\r\n" in route.headers, route.cut_usage) == (asked, asked)


def test_an_unknown_model_is_refused_and_counted_as_other() -> None:
    bench, request = Bench(two_nodes()), exchange("qwen/qwen3-8", status=404)
    with pytest.raises(ModelNotFound) as caught:
        bench.director.route(request)
    request.error = caught.value
    bench.director.done(request)
    assert NAME in caught.value.message
    line = 'cortex_requests_total{endpoint="/v1/chat/completions",model="other",node="",status="404"}'
    assert bench.samples()[line] == 1


def test_a_request_the_relay_refused_for_a_known_model_counts_as_its_own() -> None:
    bench = Bench(two_nodes())
    bench.director.done(exchange(status=400))
    line = f'cortex_requests_total{{endpoint="/v1/chat/completions",model="{NAME}",node="",status="400"}}'
    assert bench.samples()[line] == 1


def test_another_task_than_the_models_is_refused_before_anything_is_sent() -> None:
    bench = Bench(two_nodes(task="embed", capabilities=["embed"]))
    with pytest.raises(WrongTask, match="makes embeddings and cannot serve /v1/chat/completions"):
        bench.director.route(exchange())
    assert bench.sent(exchange(endpoint=EMBED)).upstream.name in ("beast", "benjy")


def test_a_model_of_unknown_task_is_left_to_its_node() -> None:
    assert Bench(two_nodes()).sent(exchange(endpoint=EMBED))


def test_the_task_is_looked_at_anew_when_the_view_changes() -> None:
    view = two_nodes()
    bench = Bench(view)
    bench.sent(exchange())
    for name in view.nodes:
        answers(view, name, info(NAME, task="rerank"))
    with pytest.raises(WrongTask):
        bench.director.route(exchange())


def test_a_name_with_a_line_break_never_becomes_a_header() -> None:
    view = fleet("beast")
    answers(view, "beast", info("evil\r\nx-injected: 1"))
    with pytest.raises(ModelNotServable, match="rename the file"):
        Bench(view).director.route(exchange("evil\r\nx-injected: 1"))


# a choice of replicas


def said(*words: str, **fields: Any) -> bytes:
    """A body of messages, one for each word."""
    return json.dumps({"messages": [{"role": "user", "content": word * 500} for word in words], **fields}).encode()


def answered(bench: Bench, request: Exchange) -> str:
    """Sent, answered and ended; where."""
    route = bench.sent(request)
    request.t_first_token = bench.now
    request.usage = request.usage or Usage(prompt_tokens=1000)
    bench.director.released(request, route)
    bench.director.done(request)
    return route.upstream.name


def test_a_conversation_that_grows_stays_where_its_prompt_is_cached() -> None:
    bench = Bench(two_nodes())
    first = answered(bench, exchange(body=said("a", "b")))
    for turn in range(3, 20):
        assert answered(bench, exchange(body=said(*"abcdefghijklmnopqrstuvw"[:turn]))) == first
    found = bench.samples()
    assert found[f'cortex_routing_choices_total{{by="new",model="{NAME}"}}'] == 1
    assert found[f'cortex_routing_choices_total{{by="prefix",model="{NAME}"}}'] == 17


@pytest.mark.parametrize("change", ["unloaded", "recovering", "down"])
def test_a_replica_that_was_away_has_lost_its_prompts(change: str) -> None:
    bench = Bench(two_nodes())
    first = answered(bench, exchange(body=said("a", "b")))
    if change == "down":
        for _ in range(2):
            bench.view.saw_miss(bench.view.nodes[first], "no answer")
    else:
        answers(bench.view, first, info(NAME, change))
    answers(bench.view, first, info(NAME))
    answered(bench, exchange(body=said("a", "b", "c")))
    assert bench.samples()[f'cortex_routing_choices_total{{by="new",model="{NAME}"}}'] == 2


def test_where_there_is_one_replica_nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr("helexa.cortex.prefixes.read", read)
    view = fleet("beast", models=[ModelProfile(id=NAME)])
    answers(view, "beast", info(NAME))
    assert answered(Bench(view), exchange(body=said("a"))) == "beast"
    assert answered(Bench(two_nodes()), exchange(endpoint=EMBED, body=said("a"))) in ("beast", "benjy")


@pytest.mark.parametrize("name", ["X-Session-Id", "x-session-affinity", "X-Claude-Code-Session-Id"])
def test_a_session_stays_where_it_was_though_its_prompt_is_another(name: str) -> None:
    bench = Bench(two_nodes())
    head = f"POST / HTTP/1.1\r\nhost: x\r\n{name}: 7f3\r\n\r\n".encode()
    places = {answered(bench, exchange(head=head, body=said(word, "x"))) for word in "abcdefgh"}
    assert len(places) == 1
    assert bench.samples()[f'cortex_routing_choices_total{{by="session",model="{NAME}"}}'] == 7


def test_blocks_that_change_with_every_request_do_not_move_a_conversation() -> None:
    bench = Bench(two_nodes())
    places = set()
    for turn in range(1, 9):
        header = f"x-anthropic-billing-header: cc_version=2.1.197; cc_entrypoint=cli; cch={turn};"
        system = [{"type": "text", "text": header}, {"type": "text", "text": "You are " * 100}]
        messages = [
            {"role": "user" if at % 2 == 0 else "assistant", "content": "x" * 500} for at in range(2 * turn - 1)
        ]
        body = json.dumps({"model": NAME, "max_tokens": 9, "system": system, "messages": messages}).encode()
        endpoint = Endpoint("/v1/messages", Dialect.ANTHROPIC, "/v1/chat/completions")
        places.add(answered(bench, exchange(endpoint=endpoint, body=body)))
    assert len(places) == 1
    assert bench.samples()[f'cortex_routing_choices_total{{by="prefix",model="{NAME}"}}'] == 7


def test_who_asks_why_gets_the_reason_for_the_replica_that_answered() -> None:
    bench = Bench(two_nodes())
    head = b"POST / HTTP/1.1\r\nhost: x\r\nX-Helexa-Explain: 1\r\n\r\n"
    request = exchange(head=head, body=said("a", "b"))
    first = bench.sent(request)
    assert f"\r\nx-helexa-route: {first.upstream.name} by new: ".encode() in request.headers_back
    bench.fail(request, first, UpstreamError("cannot be reached"))
    second = bench.sent(request)
    assert f"\r\nx-helexa-route: {second.upstream.name} by ".encode() in request.headers_back
    assert request.headers_back.count(b"x-helexa-route:") == 1
    assert request.headers_back.endswith(b"\r\n")
    quiet = exchange(body=said("a", "b"))
    bench.sent(quiet)
    assert b"x-helexa-route" not in quiet.headers_back


def test_the_prefill_rate_is_measured_and_shown() -> None:
    view = two_nodes()
    bench = Bench(view)
    request = exchange(body=said("a"), timings={"prompt_n": 500, "prompt_ms": 250.0})
    where = answered(bench, request)
    shown = {node["name"]: node["models"][0].get("prefill_tokens_per_s") for node in view.view()["nodes"]}
    assert shown == {where: 2000.0, "beast" if where == "benjy" else "benjy": None}


# loads


def test_a_model_loaded_nowhere_waits_for_a_load_and_is_then_sent() -> None:
    view = two_nodes(status="unloaded")
    bench = Bench(view, then=lambda: answers(view, "beast", info(NAME)))
    route = run(awaited(bench.director.route(exchange())))
    assert route.upstream.name == "beast"
    found = bench.samples()
    assert found[f'cortex_cold_starts_total{{model="{NAME}"}}'] == 1
    assert found[f'cortex_queue_wait_seconds_count{{model="{NAME}"}}'] == 1


def test_many_that_wait_for_one_load_are_one_cold_start_and_tell_themselves_apart() -> None:
    view = two_nodes(status="unloaded")
    gate = asyncio.Event()
    bench = Bench(view, then=gate.wait)

    async def scenario() -> None:
        waiting = [asyncio.ensure_future(awaited(bench.director.route(exchange()))) for _ in range(5)]
        await bench.loader.until_asked(5)
        answers(view, "benjy", info(NAME))
        gate.set()
        assert [route.upstream.name for route in await asyncio.gather(*waiting)] == ["benjy"] * 5

    run(scenario())
    assert len(set(bench.loader.asked)) == 5
    assert bench.samples()[f'cortex_cold_starts_total{{model="{NAME}"}}'] == 1


def test_a_load_that_fails_is_the_requests_error() -> None:
    def refuse() -> None:
        raise Overloaded("no room")

    bench = Bench(two_nodes(status="unloaded"), then=refuse)
    with pytest.raises(Overloaded):
        run(awaited(bench.director.route(exchange())))


def test_a_model_that_is_evicted_before_its_waiters_come_to_it_is_given_up_in_the_end() -> None:
    bench = Bench(two_nodes(status="unloaded"))
    with pytest.raises(ModelLoading, match="evicted"):
        run(awaited(bench.director.route(exchange())))
    assert len(bench.loader.asked) == 3


def test_progress_is_the_loaders() -> None:
    bench, request = Bench(two_nodes()), exchange()
    bench.sent(request)
    assert bench.director.progress(request) == b"loading Qwen/Qwen3-8B"


# aliases for several models


def smart(big: str = "unloaded", small: str = "loaded", **fields: Any) -> Fleet:
    """ "smart" is big on beast, else small on benjy."""
    view = fleet("beast", "benjy", models=[ModelProfile(id="big"), ModelProfile(id="small")], aliases=SMART)
    answers(view, "beast", info("big", big, **fields))
    answers(view, "benjy", info("small", small))
    return view


SMART = {"smart": ["big", "small"], "claude-*": "smart"}


def refusing(error: HelexaError, then: Callable[[], object] = lambda: None) -> Callable[[], object]:
    """Refuses the first that asks, and lets the others have what `then` brings."""
    errors = [error]

    def answer() -> object:
        if errors:
            raise errors.pop()
        return then()

    return answer


@pytest.mark.parametrize("name", ["smart", "claude-opus-4"])
def test_the_preferred_model_serves_where_it_is_loaded(name: str) -> None:
    bench, request = Bench(smart("loaded")), exchange(name)
    assert bench.sent(request).replica.model_id == "big"
    assert request.headers_back == b"x-helexa-model: big\r\n"


@pytest.mark.parametrize(("load_s", "goes"), [(None, "big"), (29.0, "big"), (31.0, "small")])
def test_the_preferred_model_is_loaded_where_that_is_done_in_time(load_s: float | None, goes: str) -> None:
    view = smart()
    bench = Bench(view, then=lambda: answers(view, "beast", info("big")))
    bench.loader.outlooks["big"] = Outlook(load_s)
    request = exchange("smart", head=b"POST / HTTP/1.1\r\nx-helexa-wait: 30\r\n\r\n")
    if goes == "small":
        assert bench.sent(request).replica.model_id == "small"
        return
    assert run(awaited(bench.director.route(request))).upstream.name == "beast"
    assert (bench.loader.models, bench.loader.deadlines) == (["big"], [1030.0])


def test_a_model_that_fails_on_every_node_is_passed_over() -> None:
    bench = Bench(smart())
    bench.loader.outlooks["big"] = Outlook(None, is_failing=True)
    assert bench.sent(exchange("smart")).replica.model_id == "small"


def test_a_load_that_fails_leaves_the_request_to_the_next_model_and_later_ones_do_not_wait_for_it() -> None:
    bench, request = Bench(smart(), then=refusing(LoadFailed("no such file", retry_after_s=10))), exchange("smart")
    route = run(awaited(bench.director.route(request)))
    assert (route.upstream.name, request.headers_back) == ("benjy", b"x-helexa-model: small\r\n")
    assert bench.sent(exchange("smart")).upstream.name == "benjy"
    assert bench.loader.models == ["big"]


def test_once_its_time_is_over_a_request_still_goes_to_a_model_that_is_loaded() -> None:
    bench = Bench(smart())

    def too_late() -> object:
        bench.now += 600
        raise ModelLoading("still loading")

    bench.loader._then = too_late
    assert run(awaited(bench.director.route(exchange("smart")))).upstream.name == "benjy"


def test_where_none_can_serve_it_each_reason_is_told() -> None:
    view = smart(small="unloaded")

    def refuse() -> object:
        raise LoadFailed(f"{bench.loader.models[-1]} is cut short")

    bench = Bench(view, then=refuse)
    with pytest.raises(LoadFailed) as caught:
        run(awaited(bench.director.route(exchange("smart"))))
    assert caught.value.message == "small is cut short; before that: big is cut short"


def test_a_node_that_dies_leaves_the_request_to_the_next_model() -> None:
    bench, request = Bench(smart("loaded")), exchange("smart")
    bench.fail(request, bench.sent(request), UpstreamError("cannot be reached"))
    assert bench.sent(request).replica.model_id == "small"


def test_a_node_that_is_full_leaves_the_request_to_the_next_model_on_the_same_node() -> None:
    view = fleet("beast", models=[ModelProfile(id="big"), ModelProfile(id="small")], aliases=SMART)
    answers(view, "beast", info("big"), info("small"))
    bench, request = Bench(view), exchange("smart")
    first = bench.sent(request)
    error = bench.refuse(request, first, 503, code="overloaded")
    assert error is not None
    bench.fail(request, first, error)
    assert bench.sent(request).replica.model_id == "small"


def test_a_model_of_another_task_is_passed_over_and_told_where_there_is_no_other() -> None:
    bench = Bench(smart("loaded", task="embed", capabilities=["embed"]))
    assert bench.sent(exchange("smart")).replica.model_id == "small"
    with pytest.raises(WrongTask):
        bench.director.route(exchange("big"))


@pytest.mark.parametrize("told", [b"soon", b"-1", b"nan", b"inf"])
def test_a_wait_that_is_none_is_refused(told: bytes) -> None:
    bench = Bench(two_nodes(status="unloaded"))
    request = exchange(head=b"POST / HTTP/1.1\r\nX-Helexa-Wait: " + told + b"\r\n\r\n")
    with pytest.raises(BadRequest, match="seconds"):
        run(awaited(bench.director.route(request)))


# bounds


def bounded(limits: Bounds | None = None, of_beast: Bounds | None = None) -> Fleet:
    view = fleet("beast", "benjy", models=[ModelProfile(id=NAME, limits=limits)])
    view.nodes["beast"].bounds = of_beast
    for name in view.nodes:
        answers(view, name, info(NAME, limits=ModelLimits(slots=2)))
    return view


def test_what_is_over_a_models_bound_waits_and_clients_take_turns() -> None:
    bench = Bench(bounded(Bounds(running=1)))
    order: list[str] = []

    async def one(client: str) -> None:
        request = exchange(client=client)
        route = await awaited(bench.director.route(request))
        order.append(client)
        await asyncio.sleep(0)
        bench.director.released(request, route)

    async def scenario() -> None:
        first = exchange()
        route = bench.sent(first)
        waiting = [asyncio.ensure_future(one(client)) for client in "aaabb"]
        await asyncio.sleep(0)
        assert bench.view.inflight == 1
        bench.director.released(first, route)
        await asyncio.gather(*waiting)

    run(scenario())
    assert order == ["a", "b", "a", "b", "a"]
    assert bench.view.inflight == 0


def test_who_leaves_gives_its_turn_to_the_next() -> None:
    bench = Bench(bounded(Bounds(running=1)))

    async def scenario() -> None:
        first = exchange()
        route = bench.sent(first)
        waiting = [asyncio.ensure_future(awaited(bench.director.route(exchange(client=c)))) for c in "abc"]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        waiting[1].cancel()
        bench.director.released(first, route)
        await asyncio.wait_for(waiting[2], 5)
        await asyncio.gather(*waiting, return_exceptions=True)

    run(scenario())
    assert bench.view.inflight == 1


def test_more_than_may_wait_are_refused_with_a_time_to_come_again() -> None:
    bench = Bench(bounded(Bounds(running=1, waiting=0)))
    bench.sent(exchange())
    with pytest.raises(Overloaded, match="0 requests wait") as caught:
        run(awaited(bench.director.route(exchange())))
    assert caught.value.retry_after_s == 5


def test_who_waited_as_long_as_it_may_is_told_so() -> None:
    bench = Bench(bounded(Bounds(running=1)))
    bench.sent(exchange())
    request = exchange(head=b"POST / HTTP/1.1\r\nx-helexa-wait: 0.01\r\n\r\n")
    with pytest.raises(Overloaded, match="had no place"):
        run(awaited(bench.director.route(request)))


def test_a_full_node_is_passed_over_and_waited_for_where_there_is_no_other() -> None:
    bench = Bench(bounded(of_beast=Bounds(running=1)))
    routes = [bench.sent(exchange()) for _ in range(4)]
    assert sorted(route.upstream.name for route in routes) == ["beast", "benjy", "benjy", "benjy"]
    bench.view.saw_draining(bench.view.nodes["benjy"])

    async def scenario() -> None:
        waiting = asyncio.ensure_future(awaited(bench.director.route(exchange())))
        await asyncio.sleep(0)
        for route in routes:
            bench.director.released(exchange(), route)
        assert (await asyncio.wait_for(waiting, 5)).upstream.name == "beast"

    run(scenario())


def test_a_model_that_goes_while_its_requests_wait_for_a_place_is_loaded_for_them() -> None:
    view = bounded(Bounds(running=1))
    bench = Bench(view, then=lambda: answers(view, "beast", info(NAME)))

    async def scenario() -> None:
        first = exchange()
        route = bench.sent(first)
        waiting = asyncio.ensure_future(awaited(bench.director.route(exchange())))
        await asyncio.sleep(0)
        for name in view.nodes:
            answers(view, name, info(NAME, "unloaded"))
        await bench.loader.until_asked(1)
        bench.director.released(first, route)
        assert (await asyncio.wait_for(waiting, 5)).upstream.name == "beast"

    run(scenario())


def test_an_alias_leaves_a_full_model_for_the_next() -> None:
    models = [ModelProfile(id="big", limits=Bounds(running=1, waiting=0)), ModelProfile(id="small")]
    view = fleet("beast", models=models, aliases=SMART)
    answers(view, "beast", info("big"), info("small"))
    bench = Bench(view)
    assert bench.sent(exchange("smart")).replica.model_id == "big"
    route = run(awaited(bench.director.route(exchange("smart"))))
    assert route.replica.model_id == "small"  # type: ignore[attr-defined]


# failures


def test_a_dead_node_is_left_for_another_and_counted() -> None:
    bench, request = Bench(two_nodes()), exchange()
    first = bench.sent(request)
    bench.fail(request, first, UpstreamError("cannot be reached"))
    second = bench.sent(request)
    assert {first.upstream.name, second.upstream.name} == {"beast", "benjy"}
    assert bench.view.nodes[first.upstream.name].state == "suspect"
    line = f'cortex_upstream_errors_total{{kind="connect",node="{first.upstream.name}"}}'
    assert bench.samples()[line] == 1


def test_when_all_failed_the_last_error_is_the_answer() -> None:
    bench, request = Bench(two_nodes()), exchange()
    for words in ("first", "second"):
        bench.fail(request, bench.sent(request), UpstreamError(words))
    with pytest.raises(UpstreamError, match="second"):
        bench.director.route(request)
    assert bench.loader.asked == []


@pytest.mark.parametrize(
    ("error", "mid_stream", "kind"),
    [(UpstreamTimeout("stalled"), True, "stall"), (UpstreamError("gone"), True, "stream")],
)
def test_the_kind_of_a_failure_is_told_apart(error: HelexaError, mid_stream: bool, kind: str) -> None:
    bench, request = Bench(two_nodes()), exchange()
    route = bench.sent(request)
    bench.fail(request, route, error, mid_stream=mid_stream)
    assert bench.samples()[f'cortex_upstream_errors_total{{kind="{kind}",node="{route.upstream.name}"}}'] == 1


def test_a_node_that_failed_mid_stream_is_not_well_because_its_first_bytes_came() -> None:
    bench, request = Bench(two_nodes()), exchange(status=200, t_first_byte=1001.0)
    route = bench.sent(request)
    error = request.error = UpstreamError("gone")
    bench.fail(request, route, error, mid_stream=True)
    bench.director.done(request)
    assert bench.view.nodes[route.upstream.name].state == "suspect"


def test_an_answer_makes_a_suspect_node_well() -> None:
    bench, request = Bench(two_nodes()), exchange(status=200, t_first_byte=1001.0)
    route = bench.sent(request)
    node = bench.view.nodes[route.upstream.name]
    bench.view.request_failed(node)
    bench.director.released(request, route)
    bench.director.done(request)
    assert node.state == "up"


# refusals


def test_a_nodes_400_goes_to_the_client_as_it_is() -> None:
    bench, request = Bench(two_nodes()), exchange()
    assert bench.refuse(request, bench.sent(request), 400, code="context_length_exceeded") is None


def test_a_full_node_is_left_for_another_and_a_full_fleet_speaks_for_itself() -> None:
    bench, request = Bench(two_nodes()), exchange()
    first = bench.sent(request)
    error = bench.refuse(request, first, 503, code="overloaded")
    assert isinstance(error, Overloaded)
    bench.fail(request, first, error)
    assert bench.view.nodes[first.upstream.name].state == "up"  # it answered: nothing is wrong with it
    assert bench.refuse(request, bench.sent(request), 503, code="overloaded") is None


def test_a_node_that_is_still_loading_is_waited_for_and_may_be_asked_again() -> None:
    view = fleet("beast", models=[ModelProfile(id=NAME)])
    answers(view, "beast", info(NAME))
    bench, request = Bench(view, then=lambda: answers(view, "beast", info(NAME))), exchange()
    first = bench.sent(request)
    loading = {"state": "loading", "node": "beast"}
    error = bench.refuse(request, first, 503, code="model_loading", loading=loading)
    assert isinstance(error, ModelLoading)
    assert error.details == {"loading": loading}
    bench.fail(request, first, error)
    assert not view.replicas(NAME)  # nobody else is sent there meanwhile
    assert run(awaited(bench.director.route(request))).upstream.name == "beast"


def test_a_node_that_no_longer_holds_the_model_is_no_404_for_the_client() -> None:
    bench, request = Bench(two_nodes()), exchange()
    assert isinstance(bench.refuse(request, bench.sent(request), 404, code="model_not_found"), ModelLoading)


@pytest.mark.parametrize("status", [500, 502])
def test_a_node_whose_host_died_is_left_for_another(status: int) -> None:
    bench, request = Bench(two_nodes()), exchange()
    assert isinstance(bench.refuse(request, bench.sent(request), status, code="upstream_error"), UpstreamError)


@pytest.mark.parametrize("status", [401, 403])
def test_a_nodes_key_is_never_the_clients_affair(status: int) -> None:
    bench, request = Bench(two_nodes()), exchange()
    error = bench.refuse(request, bench.sent(request), status, code="invalid_api_key")
    assert isinstance(error, UpstreamError)
    assert "`token` of [[neurons]]" in error.message


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b'{"error": "text"}', b'{"error": {"code": 500}}', b"\xff", b"[" * 99999]
)
def test_whatever_a_node_says_with_503_is_read(body: bytes) -> None:
    bench, request = Bench(two_nodes()), exchange()
    assert isinstance(bench.director.refused(request, bench.sent(request), 503, body), Overloaded)


@pytest.mark.parametrize("code", ["context_length_exceeded", "unsupported_modality", "upstream_timeout"])
def test_an_error_of_the_callers_told_in_a_stream_is_not_taken_to_another_node(code: str) -> None:
    bench, request = Bench(two_nodes()), exchange(stream=True)
    assert bench.refuse(request, bench.sent(request), 503, code=code) is None


def test_a_broken_host_told_in_a_stream_is() -> None:
    bench, request = Bench(two_nodes()), exchange(stream=True)
    assert isinstance(bench.refuse(request, bench.sent(request), 503, code="upstream_error"), UpstreamError)


# stalls


def test_silence_is_slowness_while_the_node_reports_the_model_at_work() -> None:
    bench, request = Bench(two_nodes(active_requests=1)), exchange()
    assert not bench.director.is_stalled(request, bench.sent(request), 130.0)


@pytest.mark.parametrize("fields", [{}, {"active_requests": 0, "queued_requests": 0}])
def test_silence_of_a_node_that_reports_no_work_is_a_stall(fields: dict[str, int]) -> None:
    bench, request = Bench(two_nodes(**fields)), exchange()
    assert bench.director.is_stalled(request, bench.sent(request), 130.0)


def test_silence_of_a_node_that_does_not_answer_its_polls_is_a_stall() -> None:
    bench, request = Bench(two_nodes(active_requests=1)), exchange()
    route = bench.sent(request)
    bench.view.saw_miss(route.replica.node, "no answer")
    assert bench.director.is_stalled(request, route, 130.0)


# counting tokens


COUNT = Endpoint("/v1/messages/count_tokens", Dialect.ANTHROPIC, "/v1/tokens/count", generates=False)
COUNTED = b'{"model":"m","messages":[{"role":"user","content":"Hi"}]}'


def counting(**fields: Any) -> Exchange:
    return exchange(endpoint=COUNT, body=COUNTED, **fields)


def test_tokens_are_counted_where_the_model_is_loaded_and_it_does_not_seem_used_by_that() -> None:
    view = two_nodes(status="unloaded")
    answers(view, "benjy", info(NAME))
    bench = Bench(view)
    route, request = bench.sent(counting()), counting()
    assert (route.upstream.name, b'"profile"' in (route.body or b"")) == ("benjy", False)
    (replica,) = view.replicas(NAME)
    assert (view.inflight, replica.last_used, replica.requests) == (0, 0.0, 0)
    bench.director.released(request, route)
    assert (view.inflight, replica.last_used) == (0, 0.0)


def test_what_is_loaded_nowhere_is_counted_where_its_file_is_by_its_profile_and_never_loaded() -> None:
    profile = ModelProfile(id=NAME, source="Qwen/Qwen3-8B-GGUF", quant="Q4_K_M", chat_template="{{ x }}")
    view = fleet("beast", "benjy", models=[profile])
    answers(view, "beast")
    answers(view, "benjy", info("Qwen/Qwen3-8B-GGUF:Q4_K_M", "unloaded"))
    bench, request = Bench(view), counting()
    route = bench.sent(request)
    assert route.upstream.name == "benjy"
    asked = json.loads(route.body or b"")
    assert route.headers == f"x-helexa-model: {NAME}\r\n".encode()
    assert asked["profile"] == {
        "model_id": NAME, "source": profile.source, "quant": "Q4_K_M", "chat_template": "{{ x }}",
    }  # fmt: skip
    assert asked["messages"] == json.loads(COUNTED)["messages"]
    # the file was not there after all: the other one may find it, and then nobody
    for status, code in ((404, "model_not_found"), (422, "load_impossible")):
        error = bench.refuse(request, route, status, code=code)
        assert isinstance(error, NoNode)
        bench.fail(request, route, error)
        if status == 404:
            route = bench.sent(request)
    with pytest.raises(NoNode, match=r"cannot be counted: beast says: no\."):
        bench.director.route(request)
    assert bench.loader.asked == []
    assert view.nodes["benjy"].models[NAME].status == "unloaded"


def test_what_only_a_disk_knows_is_counted_by_the_node_s_own_name_for_it() -> None:
    view = fleet("beast", "down")
    answers(view, "beast", info("folder/file", "unloaded"))
    route = Bench(view).sent(counting(model="folder/file"))
    assert route.headers == b"x-helexa-model: folder/file\r\n"
    assert "profile" not in json.loads(route.body or b"")
    view.saw_miss(view.nodes["beast"], "no answer")
    view.saw_miss(view.nodes["beast"], "no answer")
    with pytest.raises(NoNode, match="no node that is alive has its file"):
        Bench(view).sent(counting(model="folder/file"))


# what was taken is given back


def test_what_is_in_flight_comes_back_to_nothing_on_every_path() -> None:
    bench = Bench(two_nodes())
    served, failed = exchange(), exchange()
    route = bench.sent(served)
    bench.fail(failed, bench.sent(failed), UpstreamError("gone"))
    again = bench.sent(failed)
    assert bench.view.inflight == 2
    bench.director.released(failed, again)
    bench.director.released(served, route)
    assert bench.view.inflight == 0
    gauges = {name: value for name, value in bench.samples().items() if name.startswith("cortex_inflight")}
    assert set(gauges.values()) == {0}


def test_a_client_that_leaves_while_it_waits_leaves_nothing_behind() -> None:
    bench = Bench(two_nodes(status="unloaded"), then=asyncio.Event().wait)

    async def scenario() -> None:
        waiting = asyncio.ensure_future(awaited(bench.director.route(exchange())))
        await bench.loader.until_asked(1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    run(scenario())
    assert bench.view.inflight == 0


def test_every_request_ends_in_one_line() -> None:
    bench, request = Bench(two_nodes()), exchange(status=200, t_end=1001.0)
    route = bench.sent(request)
    bench.director.released(request, route)
    bench.director.done(request)
    bench.log.flush()
    (line,) = "".join(bench.lines).splitlines()
    assert json.loads(line)["model"] == NAME
