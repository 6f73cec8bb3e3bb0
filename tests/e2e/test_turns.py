"""A model whose chat template takes user and assistant by turns alone (Gemma 3): in each dialect what it refuses is
told, with the rule; nothing is put together but what the dialect itself has as one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.gateway import cortex_process
from tests.helpers.http import Reply
from tests.helpers.models import gemma
from tests.helpers.neuron_daemon import Daemon, neuron

pytestmark = pytest.mark.timeout(120)

FIXTURES = Path(__file__).parents[1] / "fixtures/templates"
RULE = "by turns alone, the user's first"
OWN_WORDS = "user and assistant have to take turns"
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
TWICE = [USER, USER]
ASSISTANT_FIRST = [ASSISTANT, USER]
# By path: the members of a request that holds such messages, and the field that is named.
ASKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "/v1/chat/completions": ("messages", {"max_tokens": 4}, "messages"),
    "/v1/messages": ("messages", {"max_tokens": 4}, "messages"),
    "/v1/responses": ("input", {"max_output_tokens": 16}, "input"),
    "/api/chat": ("messages", {"options": {"num_predict": 4}}, ""),
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("turns")
    template = json.dumps((FIXTURES / "gemma.jinja").read_text())  # the file that stands in for the model has none
    models = f'[[models]]\nid = "gemma"\nsource = "{gemma()}"\ncontext = 512\nslots = 1\nchat_template = {template}\n'
    with neuron(folder) as node, cortex_process(folder, {"one": node.url}, models=models) as gateway:
        gateway.wait_for(event="node is up")
        yield gateway


def ask(gateway: Daemon, path: str, messages: list[dict[str, Any]], **fields: Any) -> Reply:
    name, members, _ = ASKS[path]
    return gateway.http.post(path, {"model": "gemma", name: messages, **members, **fields})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "messages"),
    # Anthropic has consecutive messages of the user as one: below
    [*((path, ASSISTANT_FIRST) for path in ASKS), *((path, TWICE) for path in ASKS if path != "/v1/messages")],
)
def test_the_rule_is_told_in_the_dialect(
    gateway: Daemon, path: str, messages: list[dict[str, Any]], stream: bool
) -> None:
    answer = ask(gateway, path, messages, stream=stream)
    assert answer.status == 400, answer.text
    error = answer.json()["error"]
    text = error if isinstance(error, str) else error["message"]
    assert RULE in text
    assert OWN_WORDS in text
    if path in ("/v1/chat/completions", "/v1/responses"):
        assert error["param"] == ASKS[path][2]


def test_what_anthropic_has_as_one_turn_is_one(gateway: Daemon) -> None:
    assert ask(gateway, "/v1/messages", TWICE).status == 200


@pytest.mark.parametrize("path", ASKS)
def test_turns_are_answered(gateway: Daemon, path: str) -> None:
    assert ask(gateway, path, [USER, ASSISTANT, USER]).status == 200


def test_with_tools_it_is_a_422(gateway: Daemon) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    answer = ask(gateway, "/v1/chat/completions", TWICE, tools=[tool])
    assert (answer.status, answer.json()["error"]["code"]) == (422, "template_failed")
    assert RULE in answer.json()["error"]["message"]
