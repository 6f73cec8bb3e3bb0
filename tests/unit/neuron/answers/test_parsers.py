"""What each family's models write is read right, whole and in any pieces."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.writing import ALL, TOOLS, WRITE, answer, cut_at, read, whole

from helexa.neuron.harness.answers.families import FAMILIES, GENERIC, HARMONY, Family, family_of
from helexa.neuron.harness.answers.pieces import CallArguments, CallStarted, Content, collect

MARKS = [
    *(
        "<think>",
        "</think>",
        "[THINK]",
        "[/THINK]",
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
    ),
    *("<function=get_weather>", "<function=", "<parameter=city>", "</parameter>", "</function>", "<|python_tag|>"),
    *(
        "```json",
        "```tool_code",
        "\n```",
        "```",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
    ),
    *("function<｜tool▁sep｜>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "assistant"),
    *("analysis", "final", "commentary", " to=functions.get_time", "get_time", "get_weather", "nobody"),
    *('{"name": "get_time", "arguments": {}}', '{"name": "nobody", "arguments": {}}', '{"name"', "get_time()"),
    *('{"name": "get_weather", "parameters": {"city": "x"}}', "print(get_weather(city='a'))", ";", "x", "é🌦"),
    *("{", "}", "[", "]", ":", ",", '"', "\\", " ", "\n"),
]
SCRAMBLED = st.lists(st.sampled_from(MARKS), max_size=14).map("".join)
PLACES = st.lists(st.integers(0, 2000), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text("ab{}[]\"\\<>`é\n ", max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab\"", max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
CITIES = st.text('ab{}"\\<é \n', min_size=1, max_size=9).map(lambda text: f"<{text}>")
WEATHER = st.fixed_dictionaries(
    {"city": CITIES, "days": st.integers(0, 9)}, optional={"places": st.lists(VALUES, max_size=2)}
)
OTHER = st.fixed_dictionaries({"text": st.none() | st.just("null and void"), "flag": st.booleans()})
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("get_weather"), WEATHER),
        st.tuples(st.just("get_time"), st.just({})),
        st.tuples(st.just("a.b-c/d"), OTHER),
    ),
    max_size=3,
)
WORDS = st.text("abc .,<é", max_size=20).map(str.strip)


@given(form=st.sampled_from(sorted(WRITE)), thoughts=WORDS, text=WORDS, calls=CALLS, places=PLACES)
def test_what_was_written_is_read(form: str, thoughts: str, text: str, calls: Any, places: list[int]) -> None:
    family = ALL[WRITE[form][0]]
    if WRITE[form][0] in ("llama", "generic") and "tag" not in form and calls:
        text = ""  # a bare call stands at the beginning
    written = answer(form, thoughts, text, calls)
    got = collect(read(family, cut_at(written, places)))
    assert got.reasoning == thoughts
    assert got.content == text
    assert [(call.name, json.loads(call.arguments)) for call in got.calls] == calls


@given(family=st.sampled_from(sorted(ALL)), text=SCRAMBLED, places=PLACES, stream=st.booleans(), opened=st.booleans())
def test_the_pieces_do_not_depend_on_the_cuts(
    family: str, text: str, places: list[int], stream: bool, opened: bool
) -> None:
    prompt = (ALL[family].form.think or ("", ""))[0] if opened else ""
    read_so = {"stream": stream, "prompt": prompt}
    pieces = read(ALL[family], [text], **read_so)
    assert read(ALL[family], cut_at(text, places), **read_so) == pieces
    assert read(ALL[family], list(text), **read_so) == pieces


@given(family=st.sampled_from(sorted(ALL)), text=SCRAMBLED | st.text(max_size=40))
def test_only_tools_are_called_and_always_with_an_object(family: str, text: str) -> None:
    pieces = read(ALL[family], [text])
    started = [piece for piece in pieces if isinstance(piece, CallStarted)]
    assert [piece.index for piece in started] == list(range(len(started)))
    assert all(piece.name in TOOLS for piece in started)
    for call in collect(pieces).calls:
        assert isinstance(json.loads(call.arguments), dict)
    for piece, following in pairwise(pieces):
        if isinstance(piece, CallStarted):  # no call is interrupted
            assert isinstance(following, CallArguments)
            assert following.index == piece.index


@given(family=st.sampled_from(sorted(ALL.keys() - {HARMONY.name})), text=SCRAMBLED | st.text(max_size=40))
def test_without_tools_everything_but_thoughts_is_text_to_the_character(family: str, text: str) -> None:
    opening = (ALL[family].form.think or ("?", ""))[0]
    if not text.lstrip().startswith(opening):
        assert read(ALL[family], [text], {}) == ([Content(text)] if text else [])


@given(family=st.sampled_from(sorted(ALL)), text=st.text('abc <{[`"}\n', max_size=30))
def test_text_without_a_call_comes_as_it_was_written(family: str, text: str) -> None:
    assert whole(ALL[family], text).content == text


MALFORMED = {
    "hermes": [
        '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get_time", "arguments": {}\n</tool_call>',
        '<tool_call>\n{"name": "get_time", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "get_time", "arguments": {"a": nan}}\n</tool_call>',
        "<tool_call>\nget_time\n</tool_call>",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Z',
        "<tool_call>",
    ],
    "qwen-xml": [
        "<tool_call>\n<function=nobody>\n</function>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nZ\n</function>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\nZ\n</function>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nZ",
    ],
    "mistral": [
        '[TOOL_CALLS][{"name": "nobody", "arguments": {}}]',
        "[TOOL_CALLS]nobody[ARGS]{}",
        "[TOOL_CALLS]get_time[ARGS]text",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Z',
    ],
    "deepseek": ['<｜tool▁call▁begin｜>function<｜tool▁sep｜>nobody\n```json\n{}\n```'],
    "llama": ['{"name": "nobody", "parameters": {}}', '{"city": "Z"}', "<|python_tag|>nobody.call(x=1)", "{", '{"name'],
    "gemma": ["```tool_code\nnobody(1)\n```", "```json\n{}\n```", "```tool_code\nget_time(", '```json\n{"a": 1}\n```'],
    "generic": ['{"name": "nobody", "arguments": {}}', '{"answer": {"name": "get_time"}}', "{}"],
}  # fmt: skip


@pytest.mark.parametrize(("family", "text"), [(f, t) for f, texts in MALFORMED.items() for t in texts])
def test_what_is_no_call_comes_as_text(family: str, text: str) -> None:
    got = whole(ALL[family], text)
    assert (got.content, got.calls) == (text, [])


def test_a_call_after_one_that_is_none_is_read() -> None:
    got = whole(ALL["hermes"], '<tool_call>{"name": oops <tool_call>{"name": "get_time", "arguments": {}}</tool_call>')
    assert got.content == '<tool_call>{"name": oops'
    assert [call.name for call in got.calls] == ["get_time"]


@pytest.mark.parametrize(
    "form", ["hermes", "llama", "llama-tag", "mistral", "mistral-args", "deepseek", "generic", "harmony"]
)
def test_arguments_that_a_grammar_holds_are_told_as_they_come(form: str) -> None:
    written = answer(form, "", "", [("get_weather", {"city": "Zürich {", "places": [{"a": 1}]})])
    parser = ALL[WRITE[form][0]].parser(TOOLS, stream=True)
    told = [parser.feed(char) for char in written]
    pieces = [piece for some in told for piece in some]
    assert isinstance(pieces[0], CallStarted)
    assert sum(isinstance(piece, CallArguments) for piece in pieces) > 20
    got = collect([*pieces, *parser.end()])
    assert json.loads(got.calls[0].arguments) == {"city": "Zürich {", "places": [{"a": 1}]}
    assert got.content == ""


@given(form=st.sampled_from(["hermes", "mistral", "deepseek", "generic", "harmony"]), at=st.integers(0, 300))
def test_an_answer_that_was_cut_off_is_well_formed(form: str, at: int) -> None:
    """Streamed: the arguments so far. Not streamed: what is no whole call is text."""
    written = answer(form, "", "", [("get_time", {}), ("get_weather", {"city": "Zürich", "days": 3})])[:at]
    for call in whole(ALL[WRITE[form][0]], written).calls:
        json.loads(call.arguments)
    wanted = {
        "get_time": "{}",
        "get_weather": json.dumps({"city": "Zürich", "days": 3}, ensure_ascii=False),
    }
    for call in whole(ALL[WRITE[form][0]], written, stream=True).calls:
        assert wanted[call.name].startswith(call.arguments)


def test_thoughts_that_the_prompt_opened_are_thoughts() -> None:
    family = ALL["hermes"]
    got = whole(family, "hm\n</think>\n\nYo", prompt="<|im_start|>assistant\n<think>\n")
    assert (got.reasoning, got.content) == ("hm", "Yo")
    got = whole(family, "Yo", prompt="<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (got.reasoning, got.content) == ("", "Yo")
    assert whole(family, "hm", prompt="<think>").reasoning == "hm"
    assert whole(family, "a <think> b").content == "a <think> b"


def test_a_call_within_thoughts_is_a_thought() -> None:
    text = '<think>\n<tool_call>{"name": "get_time", "arguments": {}}</tool_call>\n</think>\nno'
    got = whole(ALL["hermes"], text)
    assert (got.content, got.calls) == ("no", [])


def test_parameters_written_bare_are_typed_by_the_schema() -> None:
    tools = {
        "f": {
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "flag": {"type": "boolean"},
                "maybe": {"type": ["string", "null"]},
                "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "deep": {"type": "object"},
                "word": {"enum": ["1", "2"]},
            }
        }
    }
    values = {
        "text": "1",
        "count": "2",
        "flag": "True",
        "maybe": "null",
        "either": "3",
        "deep": '{"a": [1]}',
        "word": "1",
    }
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    got = whole(ALL["qwen-xml"], f"<tool_call>\n<function=f>\n{parameters}</function>\n</tool_call>", tools)
    assert json.loads(got.calls[0].arguments) == {
        "text": "1", "count": 2, "flag": True, "maybe": None, "either": 3, "deep": {"a": [1]}, "word": "1",
    }  # fmt: skip


def test_a_value_may_hold_what_ends_a_function() -> None:
    code = "def f():\n    return '</function>'"
    text = f"<function=get_weather>\n<parameter=city>\n{code}\n</parameter>\n</function>"
    assert json.loads(whole(ALL["qwen-xml"], text).calls[0].arguments) == {"city": code}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<|python_tag|>get_weather.call(city='Z', days=3)", {"city": "Z", "days": 3}),
        ('<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Z"}}', {"city": "Z"}),
        ('<|python_tag|>[get_weather(city="Z")]', {"city": "Z"}),
        ('{"type": "function", "function": {"name": "get_weather", "arguments": "{\\"city\\": 1}"}}', {"city": 1}),
    ],
)
def test_llama_calls_in_python_and_json(text: str, wanted: dict[str, Any]) -> None:
    (call,) = whole(ALL["llama"], text).calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", wanted)


def test_program_text_goes_to_the_tool_that_runs_it() -> None:
    tools = {"python": {"properties": {"source": {"type": "string"}}}}
    (call,) = whole(ALL["llama"], "<|python_tag|>print(1)\nprint(2)", tools).calls
    assert (call.name, json.loads(call.arguments)) == ("python", {"source": "print(1)\nprint(2)"})


@pytest.mark.parametrize("code", ["get_weather(city='Z')", "print(get_weather('Z'))", "x = get_weather(city='Z')"])
def test_gemma_calls_in_python(code: str) -> None:
    got = whole(ALL["gemma"], f"Sure.\n```tool_code\n{code}\n```\nWait.")
    assert (got.content, got.calls[0].name) == ("Sure.Wait.", "get_weather")
    assert json.loads(got.calls[0].arguments) == {"city": "Z"}


def test_harmony_is_told_by_channel() -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>Looking.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city":"Z"}<|call|>'
    )
    got = whole(HARMONY, text)
    assert (got.reasoning, got.content, got.calls[0].arguments) == ("hm", "Looking.", '{"city":"Z"}')
    assert whole(HARMONY, "x<|return|>", prompt="<|start|>assistant<|channel|>analysis<|message|>").reasoning == "x"
    assert whole(HARMONY, "plain words").content == "plain words"
    wrong = "<|channel|>commentary to=functions.get_weather<|message|>{oops"
    assert whole(HARMONY, wrong).content == wrong


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("hermes-thinking", "hermes"), ("xml-parameters", "qwen-xml"), ("llama3", "llama"), ("mistral", "mistral"),
        ("gemma", "gemma"), ("deepseek-thinking", "deepseek"), ("harmony", "harmony"), ("chatml", "generic"),
    ],
)  # fmt: skip
def test_the_family_is_told_by_the_template(template: str, name: str) -> None:
    from tests.helpers.conversations import source

    assert family_of(source(template)).name == name


def test_ids_are_new_in_each_answer() -> None:
    text = '{"name": "get_time", "arguments": {}}'
    ids = {collect(GENERIC.parser(TOOLS).feed(text)).calls[0].id for _ in range(9)}
    assert len(ids) == 9


def test_every_family_is_written_by_a_form_of_these_tests() -> None:
    assert {family for family, _ in WRITE.values()} == set(ALL)
    assert all(isinstance(family, Family) for _, family in FAMILIES)
