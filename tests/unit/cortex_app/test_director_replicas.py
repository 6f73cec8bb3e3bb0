"""Which of a model's replicas the Director chooses: where the prompt is cached, where the session was, and why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helpers.directors import EMBED, NAME, Bench, exchange, two_nodes
from tests.helpers.fleets import answers, fleet, info

from helexa.core.catalogue import ModelProfile
from helexa.core.errors import Dialect, UpstreamError
from helexa.core.relay.contract import Endpoint, Exchange, Usage


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
