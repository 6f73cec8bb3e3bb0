"""What of a request the chat template is shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helpers.torch_serving import CONTEXT, Letters

from helexa.core.errors import ContextLengthExceeded
from helexa.neuron.harness import openai_fields as fields
from helexa.neuron.harness.torch.prompts import Prompts

NOW = {"type": "function", "function": {"name": "now", "description": None}}
USER = {"role": "user", "content": "Hi"}


def read(**body: Any) -> tuple[bytes, fields.ChatRequest]:
    raw = json.dumps({"messages": [USER], **body}).encode()
    return raw, fields.read_chat(raw, max_choices=4, context=CONTEXT)


class Shown:
    """A template that keeps what it is given."""

    def __init__(self, text: str = "tools") -> None:
        self.text = text
        self.given: dict[str, Any] = {}

    def render(self, messages: Any, **given: Any) -> str:
        self.given = {"messages": messages, **given}
        return "x"


def shown(template: Shown, *messages: dict[str, Any], **body: Any) -> dict[str, Any]:
    prompts = Prompts(Letters(), template, model="tiny", context=CONTEXT, merges_system=body.pop("merges", False))
    raw, asked = read(**({"messages": list(messages)} if messages else {}), **body)
    prompts.of_chat(raw, asked)
    return template.given


def test_parts_become_one_text_and_arguments_a_mapping() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    given = shown(Shown(), parts, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"})
    assert given["messages"][0]["content"] == "a\nb"
    assert given["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_a_developers_message_is_the_systems_where_the_template_knows_no_developer() -> None:
    message = {"role": "developer", "content": "Be brief."}
    assert shown(Shown(), message, USER)["messages"][0]["role"] == "system"
    assert shown(Shown("tools developer"), message, USER)["messages"][0]["role"] == "developer"


def test_an_answer_that_is_begun_is_gone_on_with() -> None:
    begun = {"role": "assistant", "content": "It is"}
    assert shown(Shown(), USER, begun)["continue_final"] is True
    assert shown(Shown(), USER)["continue_final"] is False


def test_tools_are_shown_without_nulls_or_told_as_text() -> None:
    assert shown(Shown(), tools=[NOW])["tools"] == [{"type": "function", "function": {"name": "now"}}]
    told = shown(Shown("plain"), tools=[NOW])
    assert told["tools"] is None
    assert '"now"' in told["messages"][0]["content"]


def test_system_messages_are_one_where_the_template_takes_only_one() -> None:
    apart = [{"role": "system", "content": "a"}, USER, {"role": "system", "content": "b"}]
    assert [m["role"] for m in shown(Shown(), *apart, merges=True)["messages"]] == ["system", "user"]
    assert len(shown(Shown(), *apart)["messages"]) == 3


def test_effort_and_kwargs_reach_the_template() -> None:
    given = shown(Shown(), reasoning_effort="none", chat_template_kwargs={"x": 1})
    assert given["values"] == {"reasoning_effort": "none", "enable_thinking": False, "thinking": False, "x": 1}
    assert shown(Shown(), thinking_budget_tokens=0)["values"] == {"enable_thinking": False, "thinking": False}


def test_an_embedding_may_fill_the_context_and_a_completion_needs_room_for_a_token() -> None:
    prompts = Prompts(Letters(), None, model="tiny", context=CONTEXT, merges_system=False)
    full = [7] * CONTEXT
    asked = fields.read_embedding(json.dumps({"input": full}).encode())
    assert prompts.of_embedding(asked) == [tuple(full)]
    with pytest.raises(ContextLengthExceeded):
        prompts.of_embedding(fields.read_embedding(json.dumps({"input": [*full, 7]}).encode()))
    with pytest.raises(ContextLengthExceeded):
        prompts.of_completion(
            fields.read_completion(json.dumps({"prompt": full}).encode(), max_choices=4, context=CONTEXT)
        )
