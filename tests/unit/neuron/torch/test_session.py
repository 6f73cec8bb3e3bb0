from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.helpers.exchanges import CHAT, COMPLETIONS, exchange
from tests.helpers.torch_facts import FILES, facts

from helexa.core.errors import BadRequest, UnsupportedModality, WrongTask
from helexa.core.lifecycle import Estimate, LoadRequest
from helexa.neuron.harness.base import Plan
from helexa.neuron.harness.openai_lists import EMBEDDINGS, RERANK
from helexa.neuron.harness.torch.session import TorchSession

USER = [{"role": "user", "content": "Hi"}]


def session(task: str = "chat", **changes: Any) -> TorchSession:
    known = facts(task=task, **changes)
    request = LoadRequest(model_id="tiny")
    return TorchSession(Plan(request, FILES, known, Estimate(devices=[]), 1024, 4, (0,)))


def test_a_request_passes_untouched() -> None:
    for body, path in (({"messages": USER, "stream": True}, CHAT), ({"prompt": "x"}, COMPLETIONS)):
        prepared = session().prepare(exchange(body, path))
        assert (prepared.body, prepared.mend, prepared.dropped) == (None, None, ())


@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}])
def test_usage_is_asked_for_where_the_gateway_wants_it_and_the_client_does_not(options: dict[str, Any]) -> None:
    asked = exchange({"messages": USER, "stream": True, **options}, gateway_usage=True)
    prepared = session().prepare(asked)
    assert prepared.body is not None
    assert msgspec.json.decode(prepared.body) == {
        "messages": USER,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    whole = exchange({"messages": USER}, gateway_usage=True)
    assert session().prepare(whole).body is None  # it has usage anyway


def test_what_is_known_and_not_done_is_named() -> None:
    assert session().prepare(exchange({"messages": USER, "verbosity": "low"})).dropped == ("verbosity",)


@pytest.mark.parametrize(
    ("task", "path", "body"),
    [
        ("chat", EMBEDDINGS, {"input": "x"}),
        ("chat", RERANK, {"query": "x", "documents": ["y"]}),
        ("completion", CHAT, {"messages": USER}),
        ("embed", COMPLETIONS, {"prompt": "x"}),
    ],
)
def test_another_task_is_refused(task: str, path: str, body: dict[str, Any]) -> None:
    with pytest.raises(WrongTask):
        session(task).prepare(exchange(body, path))


def test_a_picture_is_refused_where_it_stands() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(UnsupportedModality) as refused:
        session().prepare(exchange({"messages": [{"role": "user", "content": [picture]}]}))
    assert refused.value.param == "messages[0].content[0]"


def test_dimensions_are_refused_unless_the_model_bears_a_cut() -> None:
    with pytest.raises(BadRequest, match="cannot be chosen"):
        session("embed").prepare(exchange({"input": "x", "dimensions": 64}, EMBEDDINGS))
    able = session("embed", capabilities=("embed", "dimensions"))
    able.prepare(exchange({"input": "x", "dimensions": 64}, EMBEDDINGS))
    with pytest.raises(BadRequest, match="1152 at most"):
        able.prepare(exchange({"input": "x", "dimensions": 2000}, EMBEDDINGS))
