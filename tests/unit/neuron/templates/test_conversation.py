from __future__ import annotations

import pytest
from tests.helpers.conversations import source

from helexa.neuron.harness.templates.conversation import nine_of, wants_nine, with_mappings


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        ('{"a": ', '{"a": '),
        ("[1]", "[1]"),
        ("[" * 9999, "[" * 9999),
    ],
)
def test_arguments_are_objects_for_a_template_and_what_is_none_stays(arguments: object, wanted: object) -> None:
    message = {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": arguments}}]}
    shown = with_mappings(message)
    assert shown["tool_calls"][0]["function"] == {"name": "f", "arguments": wanted}
    assert message["tool_calls"][0]["function"]["arguments"] == arguments  # type: ignore[index]


def test_where_a_template_wants_nine_letters_call_and_result_get_the_same_ones() -> None:
    assert wants_nine(source("mistral"))
    assert not wants_nine(source("hermes-thinking"))
    call = with_mappings({"role": "assistant", "tool_calls": [{"id": "call_1", "function": {"name": "f"}}]}, nine=True)
    result = with_mappings({"role": "tool", "tool_call_id": "call_1", "content": "1"}, nine=True)
    assert call["tool_calls"][0]["id"] == result["tool_call_id"] == nine_of("call_1")
    assert len(nine_of("call_1")) == 9
    assert nine_of("abcdefgh1") == "abcdefgh1"
