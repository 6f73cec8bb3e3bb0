"""The gateway's Director over a real Fleet: where requests go, what waits for a load, and that all is given back."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.helpers.aio import run
from tests.helpers.directors import CHAT, EMBED, NAME, Bench, awaited, exchange, two_nodes
from tests.helpers.fleets import answers, fleet, info

from helexa.core.catalogue import ModelProfile
from helexa.core.errors import ModelLoading, ModelNotFound, ModelNotServable, Overloaded, UpstreamError, WrongTask
from helexa.core.relay.contract import Endpoint

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
