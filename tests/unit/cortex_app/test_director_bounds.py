"""Bounds of models and nodes at the Director: who waits, whose turn it is, who is refused."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.aio import run
from tests.helpers.directors import NAME, Bench, awaited, exchange
from tests.helpers.fleets import answers, fleet, info

from helexa.core.catalogue import ModelProfile
from helexa.core.config import Bounds
from helexa.core.errors import Overloaded
from helexa.core.lifecycle import ModelLimits
from helexa.cortex.fleet import Fleet


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
