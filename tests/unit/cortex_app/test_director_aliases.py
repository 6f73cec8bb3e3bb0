"""An alias for several models: the first that can serve in time does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.helpers.aio import run
from tests.helpers.directors import Bench, awaited, exchange, two_nodes
from tests.helpers.fleets import answers, fleet, info

from helexa.core.catalogue import ModelProfile
from helexa.core.config import Bounds
from helexa.core.errors import BadRequest, HelexaError, LoadFailed, ModelLoading, UpstreamError, WrongTask
from helexa.cortex.fallbacks import Outlook
from helexa.cortex.fleet import Fleet


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


def test_an_alias_leaves_a_full_model_for_the_next() -> None:
    models = [ModelProfile(id="big", limits=Bounds(running=1, waiting=0)), ModelProfile(id="small")]
    view = fleet("beast", models=models, aliases=SMART)
    answers(view, "beast", info("big"), info("small"))
    bench = Bench(view)
    assert bench.sent(exchange("smart")).replica.model_id == "big"
    route = run(awaited(bench.director.route(exchange("smart"))))
    assert route.replica.model_id == "small"  # type: ignore[attr-defined]
