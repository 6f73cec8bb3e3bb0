"""System messages as one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.neuron.harness import system_messages
from helexa.neuron.harness.openai_fields import read_chat

TEXTS = st.text(max_size=5)
PARTS = st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=3)
MESSAGES = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "developer", "user", "assistant"]),
        TEXTS | PARTS,
    ),
    min_size=1,
    max_size=6,
)


def merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = json.loads(system_messages.merged(json.dumps(messages).encode()))
    return made


def stand_apart(messages: list[dict[str, Any]]) -> bool:
    body = json.dumps({"messages": messages}).encode()
    return system_messages.stand_apart(read_chat(body, max_choices=1, context=512).messages or ())


def words(content: Any) -> list[str]:
    """The texts of a content that are not empty."""
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return [text for text in texts if text]


@given(MESSAGES)
def test_one_system_message_is_left_with_all_that_they_said_and_nothing_else_moves(
    messages: list[dict[str, Any]],
) -> None:
    if not stand_apart(messages):
        return
    first, *rest = merged(messages)
    said = [word for m in messages if m["role"] in system_messages.ROLES for word in words(m["content"])]
    assert first["role"] in system_messages.ROLES
    assert rest == [m for m in messages if m["role"] not in system_messages.ROLES]
    assert not stand_apart([first, *rest])
    assert (first["content"] if isinstance(first["content"], str) else "\n\n".join(words(first["content"]))) == (
        "\n\n".join(said)
    )


@pytest.mark.parametrize(
    ("rendered", "shown"),
    [
        ("<s>helexa-first</s><s>helexa-second</s>Hello<s>helexa-third</s>", True),
        ("<s>helexa-first</s><s>helexa-second</s>Hello", False),
        ("helexa-first helexa-third helexa-second", False),
        ("", False),
    ],
)
def test_a_template_shows_them_all_in_order_or_wants_one(rendered: str, shown: bool) -> None:
    assert system_messages.are_shown(rendered) is shown
