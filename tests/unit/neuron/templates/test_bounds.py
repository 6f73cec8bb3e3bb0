"""No template takes long, or much memory, whatever it does."""

from __future__ import annotations

import threading
import time
import tracemalloc

import pytest
from tests.helpers.conversations import TOOL, called, source, user

from helexa.core.errors import TemplateFailed

pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install -e '.[torch]'")
from helexa.neuron.harness.templates import budget
from helexa.neuron.harness.templates.template import ChatTemplate

TWICE = "{% set ns = namespace(s=START) %}{% for i in range(99) %}{% set ns.s = MORE %}{% endfor %}{{ ns.s }}"


def twice(start: str, more: str) -> str:
    return TWICE.replace("START", start).replace("MORE", more)


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops whose test fails": "{% for a in range(99999) %}{% for b in range(99999) if 0 %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "methods": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x'.split() and '' }}{% endfor %}{% endfor %}",
}
HUGE = {
    "output": "{% for a in range(99999) %}{% for b in range(9999) %}" + "y" * 9999 + "{% endfor %}{% endfor %}",
    "text put together": twice("'x' * 99", "ns.s ~ ns.s"),
    "text added": twice("'x' * 99", "ns.s + ns.s"),
    "text joined": twice("'x' * 99", "ns.s.join([ns.s, ns.s])"),
    "text formatted": twice("'x' * 99", "'{0}{0}'.format(ns.s)"),
    "text formatted with %": twice("'x' * 99", "'%s%s' % (ns.s, ns.s)"),
    "text replaced": twice("'x' * 99", "ns.s.replace('x', 'xx')"),
    "a block": TWICE.replace("START", "'x' * 99").replace(
        "{% set ns.s = MORE %}", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"
    ),
    "a macro": "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}" + twice("'x' * 99", "f(ns.s)"),
    "a list in itself": twice("['x']", "[ns.s, ns.s]"),
    "a tuple in itself": twice("('x', 'y')", "(ns.s, ns.s)"),
    "an object in itself": twice("{'x': 1}", "{'a': ns.s, 'b': ns.s}").replace("{{ ns.s }}", "{{ ns.s | tojson }}"),
    "a dict in itself": twice("{'x': 1}", "dict(a=ns.s, b=ns.s)"),
    "lists added": twice("['x']", "ns.s + ns.s"),
    "what is kept": twice("[]", "ns.s + ['x' * 99999 ~ i]"),
    "a product": "{{ 'x' * 10**10 }}",
    "a list's product": "{{ [[1] * 99999] * 99999 }}",
    "padding": "{{ 'x' | center(9999999999) }}",
    "a method's padding": "{{ 'x'.ljust(9999999999) }}",
    "tabs": "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "a width": "{{ '{:>9999999999}'.format(1) }}",
    "a width given apart": "{{ '{:{w}}'.format(1, w=9999999999) }}",
    "a width in %": "{{ '%9999999999d' % 1 }}",
    "a width in a filter": "{{ '%*d' | format(9999999999, 1) }}",
    "joining": "{{ ([''] * 99999) | join('x' * 99999) }}",
    "replacing nothing": "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "indenting": "{{ ('\\n' * 99999) | indent(99999) }}",
    "JSON": "{{ ([1] * 9999) | tojson(indent=999999) }}",
    "filling": "{{ [1] | batch(9999999999, 1) | list }}",
    "translating": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "a time": "{{ strftime_now('%999999999d') }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "products of numbers": twice("10", "ns.s * ns.s"),
    "places": "{{ 1.5 | round(999999999, 'ceil') }}",
}


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_a_template_without_an_end_is_ended(text: str) -> None:
    template = ChatTemplate(text, budget=lambda: budget.Budget(cpu_s=0.1))
    begun = time.thread_time()
    with pytest.raises(TemplateFailed, match=r"was ended: it takes more than 0\.1 s"):
        template.render([user()])
    assert time.thread_time() - begun < 5


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_a_template_that_makes_too_much_is_ended_before_it_has_the_memory(text: str) -> None:
    template = ChatTemplate(text, budget=lambda: budget.Budget(made=1 << 22))
    tracemalloc.start()
    try:
        with pytest.raises(TemplateFailed, match="was ended"):
            template.render([user()])
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


def test_a_recursion_without_an_end_is_told() -> None:
    for text in (
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for a in [0] recursive %}{{ loop([0]) }}{% endfor %}",
    ):
        with pytest.raises(TemplateFailed, match="calls itself too deeply"):
            ChatTemplate(text).render([user()])


def test_nothing_is_worked_out_while_a_template_is_read() -> None:
    begun = time.thread_time()
    ChatTemplate("{{ 'x' * 10 ** 9 }}{{ 9 ** 9 ** 9 }}{{ 'x' | center(999999999) }}{% set a = ['x' * 10 ** 9] %}")
    assert time.thread_time() - begun < 1


def test_a_long_conversation_with_many_tools_is_far_from_the_bounds() -> None:
    turn = [user("hello " * 50), called({"id": "1", "function": {"name": "f", "arguments": {"a": "b" * 100}}})]
    messages = [*(turn * 500), user()]
    begun = time.thread_time()
    prompt = ChatTemplate(source("hermes-thinking")).render(messages, tools=[TOOL] * 24)
    assert time.thread_time() - begun < budget.CPU_S / 2
    assert prompt.count("<tool_call>") == 501


def test_renderings_side_by_side_spend_their_own() -> None:
    template = ChatTemplate("{% for i in range(20000) %}x{% endfor %}")
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(len(template.render([user()])))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [20000] * 4
