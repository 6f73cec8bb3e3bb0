"""The templates of tests/fixtures have the shapes of the families; what transformers makes of each is right."""

from __future__ import annotations

import warnings
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.conversations import CONVERSATIONS, SPECIAL, TEMPLATES, TOOL, called, source, user

from helexa.core.errors import BadRequest, TemplateFailed

pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install -e '.[torch]'")
from helexa.neuron.harness.templates.template import ChatTemplate, TemplateBroken

NAMES = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))


@pytest.fixture(scope="module")
def reference() -> Any:
    """How transformers renders; None where it raises."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils.chat_template_utils import render_jinja_template

    def rendered(text: str, messages: list[Any], tools: Any, values: dict[str, Any], **options: Any) -> str | None:
        # apply_chat_template drops what is None before it renders
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            prompts, _ = render_jinja_template(
                [chat], tools=tools, chat_template=text, **{**SPECIAL, **values}, **options
            )
        except Exception:
            return None
        prompt: str = prompts[0]
        return prompt

    return rendered


def ours(text: str, messages: list[Any], tools: Any, values: dict[str, Any], **options: Any) -> str | None:
    try:
        return ChatTemplate(text, SPECIAL).render(messages, tools=tools, values=values, **options)
    except (BadRequest, TemplateFailed):
        return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conversation", sorted(CONVERSATIONS))
def test_a_prompt_is_what_transformers_makes_byte_for_byte(reference: Any, name: str, conversation: str) -> None:
    messages, tools, values = CONVERSATIONS[conversation]
    for generation in (True, False):
        wanted = reference(source(name), messages, tools, values, add_generation_prompt=generation)
        assert ours(source(name), messages, tools, values, add_generation_prompt=generation) == wanted


def test_every_conversation_is_shown_by_some_template_and_every_template_shows_some() -> None:
    shown = {
        (name, about)
        for name in NAMES
        for about, conversation in CONVERSATIONS.items()
        if ours(source(name), *conversation) is not None
    }
    assert {name for name, _ in shown} == set(NAMES)
    assert {about for _, about in shown} == set(CONVERSATIONS)


TEXTS = st.text(max_size=12) | st.sampled_from(["<think>", "{{ 1 }}", "</think>\n", "<|im_end|>", "\r\n"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.one_of(
        st.builds(user, TEXTS),
        st.builds(lambda text: {"role": "assistant", "content": text}, TEXTS),
        st.builds(
            lambda name, arguments: called(
                {"id": "abcdefgh1", "type": "function", "function": {"name": name, "arguments": arguments}}
            ),
            TEXTS,
            st.dictionaries(TEXTS, VALUES, max_size=3),
        ),
        st.builds(lambda text: {"role": "tool", "tool_call_id": "abcdefgh1", "content": text}, TEXTS),
    ),
    min_size=1,
    max_size=5,
)


@given(name=st.sampled_from(NAMES), messages=MESSAGES, tools=st.sampled_from([None, [TOOL]]))
def test_any_conversation_is_rendered_as_transformers_does(
    reference: Any, name: str, messages: list[Any], tools: Any
) -> None:
    wanted = reference(source(name), messages, tools, {}, add_generation_prompt=True)
    assert ours(source(name), messages, tools, {}) == wanted


@pytest.mark.parametrize("name", ["chatml", "gemma", "mistral", "llama3"])
@pytest.mark.parametrize("final", ["Sure,", "Sure, \n", [{"type": "text", "text": "Sure, "}]])
def test_the_last_message_is_gone_on_with_as_transformers_does(reference: Any, name: str, final: Any) -> None:
    messages = [user("Hi"), {"role": "assistant", "content": final}]
    wanted = reference(source(name), messages, None, {}, continue_final_message=True)
    assert ours(source(name), messages, None, {}, continue_final=True) == wanted


def test_a_message_without_text_cannot_be_gone_on_with() -> None:
    template = ChatTemplate(source("hermes-thinking"))
    with pytest.raises(BadRequest, match="no text to go on with"):
        template.render([user(), {"role": "assistant", "content": None}], continue_final=True)


def test_tools_choose_the_template_that_is_named_for_them() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "with {{ tools | length }}"})
    assert template.render([user()]) == "plain"
    assert template.render([user()], tools=[TOOL]) == "with 1"
    with pytest.raises(TemplateFailed, match="no default"):
        ChatTemplate({"rag": "x"}).render([user()])


def test_the_time_is_told_as_the_template_asks() -> None:
    now = datetime(2027, 1, 2, 3, 4, tzinfo=UTC)
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: now).render([user()]) == "02 Jan 2027"


def test_what_a_template_refuses_is_the_callers_fault_and_with_tools_a_422() -> None:
    template = ChatTemplate(source("gemma"), SPECIAL, model="g")
    with pytest.raises(BadRequest, match="g: its chat template refuses these messages: user and assistant"):
        template.render([user(), user()])
    with pytest.raises(TemplateFailed, match="with tools: user and assistant") as failed:
        template.render([user(), user()], tools=[TOOL])
    assert failed.value.status == 422


@pytest.mark.parametrize("text", ["{{ a.b.c }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}", "{{ messages.pop() }}"])
def test_a_template_that_breaks_is_told_and_the_conversation_is_as_it_was(text: str) -> None:
    messages = [user()]
    with pytest.raises(TemplateFailed, match="fails on these messages"):
        ChatTemplate(text).render(messages)
    assert messages == [user()]


@pytest.mark.parametrize("text", ["{% if %}", "{% for x in y %}", "{{ x | nonesuch }}", "{" * 9 + "%", "x" * (1 << 21)])
def test_what_is_no_template_is_told_when_it_is_read(text: str) -> None:
    with pytest.raises(TemplateBroken, match="chat template"):
        ChatTemplate(text)


def test_the_values_of_a_request_do_not_replace_its_messages() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ mode }}{{ add_generation_prompt }}")
    values = {"messages": [user("other")], "mode": "m", "add_generation_prompt": False}
    assert template.render([user("Hi")], values=values) == "HimTrue"


def test_what_a_template_reads_is_known() -> None:
    assert "enable_thinking" in ChatTemplate(source("hermes-thinking")).variables
    assert "reasoning_effort" in ChatTemplate(source("harmony")).variables
    assert "enable_thinking" not in ChatTemplate(source("llama3")).variables
