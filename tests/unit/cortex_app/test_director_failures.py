"""What the Director makes of a node that fails, refuses or is silent."""

from __future__ import annotations

import pytest
from tests.helpers.aio import run
from tests.helpers.directors import NAME, Bench, awaited, exchange, two_nodes
from tests.helpers.fleets import answers, fleet, info

from helexa.core.catalogue import ModelProfile
from helexa.core.errors import HelexaError, ModelLoading, Overloaded, ShuttingDown, UpstreamError, UpstreamTimeout

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


def test_what_a_node_had_that_shuts_down_is_loaded_elsewhere_though_the_node_has_not_told_yet() -> None:
    view = fleet("beast", "benjy", models=[ModelProfile(id=NAME)])
    answers(view, "beast", info(NAME))
    bench, request = Bench(view, then=lambda: answers(view, "benjy", info(NAME))), exchange()
    first = bench.sent(request)
    refusal = bench.refuse(request, first, 503, code="shutting_down")
    assert isinstance(refusal, ShuttingDown)
    bench.fail(request, first, refusal)
    assert view.nodes["beast"].state == "draining"
    assert run(awaited(bench.director.route(request))).upstream.name == "benjy"
    assert bench.loader.models == [NAME]
