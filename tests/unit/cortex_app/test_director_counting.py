"""Where the Director has tokens counted: where the model is loaded, else where its file is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helpers.directors import NAME, Bench, exchange, two_nodes
from tests.helpers.fleets import answers, fleet, info

from helexa.core.catalogue import ModelProfile
from helexa.core.errors import Dialect, NoNode
from helexa.core.relay.contract import Endpoint, Exchange
from helexa.cortex import counting as counting_rules

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


def test_a_template_that_fails_is_the_last_word() -> None:
    body = json.dumps({"error": {"message": "its chat template fails", "code": "template_failed"}}).encode()
    assert counting_rules.judge("m", "beast", 422, body) is None


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
