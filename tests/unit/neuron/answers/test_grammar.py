"""What the grammars allow, asked of llguidance: right calls, wrong ones, and text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.writing import ALL, TOOLS, WRITE, answer, whole

from helexa.neuron.harness.answers.grammar import call_grammar

llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed: pip install -e '.[torch]'")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[torch]'")

FORMS = {  # family -> the form that its grammar writes
    "hermes": "hermes",
    "qwen-xml": "qwen-xml",
    "llama": "llama",
    "mistral": "mistral",
    "mistral-args": "mistral-args",
    "deepseek": "deepseek",
    "deepseek-short": "deepseek-short",
    "gemma": "generic",
    "generic": "generic",
    "harmony": "harmony",
}
SCHEMAS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "places": {"type": "array", "items": {"$ref": "#/$defs/place"}},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {
            "place": {"type": "object", "properties": {"lat": {"type": "number"}}, "additionalProperties": False}
        },
    },
    "get_time": None,
}
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|channel|>", "<|message|>"]
MARKS += ["<|end|>", "<|start|>", "<|constrain|>", "<|call|>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"]
MARKS += ["<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"]


class Bytes:
    """A tokenizer of single bytes, with the marks as tokens of their own, or none."""

    def __init__(self, marks: list[str]) -> None:
        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        self.tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
        self.tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = tokenizers.decoders.ByteLevel()
        self.tokenizer.add_special_tokens(["<eos>"])
        self.tokenizer.add_tokens([tokenizers.AddedToken(mark) for mark in marks])
        self.eos = self.tokenizer.token_to_id("<eos>")
        self.marks = {mark: self.tokenizer.token_to_id(mark) for mark in marks}
        self.inner = llguidance.LLTokenizer(
            self.tokenizer.to_str(), n_vocab=self.tokenizer.get_vocab_size(), eos_token=self.eos
        )

    def takes(self, grammar: str, text: str, *, whole: bool = True) -> bool:
        """The grammar allows this text as an answer (or as the beginning of one)."""
        matcher = llguidance.LLMatcher(self.inner, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids + ([self.eos] if whole else [])
        return bool(matcher.validate_tokens(ids) == len(ids))


TOKENIZERS = {"marks are tokens": Bytes(MARKS), "marks are text": Bytes([])}
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("get_time"), st.just({})),
        st.tuples(
            st.just("get_weather"),
            st.fixed_dictionaries(
                {"city": st.text('aé "\\{', max_size=5), "days": st.integers(0, 9)},
                optional={"places": st.lists(st.fixed_dictionaries({"lat": st.integers(0, 9)}), max_size=2)},
            ).map(lambda given: {key: given[key] for key in ("city", "days", "places") if key in given}),
        ),
    ),
    min_size=1,
    max_size=3,
)


def grammar(family: str, tokenizer: Bytes, *names: str, **options: Any) -> str:
    tools = [(name, SCHEMAS[name]) for name in names or SCHEMAS]
    made = call_grammar(ALL[family], tools, tokenizer.marks, **{"forced": True, **options})
    assert made is not None
    return made


def written(family: str, calls: Any, thoughts: str = "", text: str = "") -> str:
    return answer(FORMS[family], thoughts, text, calls).removesuffix("<|call|>")


@pytest.mark.parametrize("marks", TOKENIZERS)
@pytest.mark.parametrize("family", FORMS)
@settings(max_examples=12)
@given(calls=CALLS)
def test_right_calls_are_allowed_and_read_back(family: str, marks: str, calls: Any) -> None:
    if family in ("harmony", "gemma", "generic"):
        calls = calls[:1]
    text = written(family, calls)
    assert TOKENIZERS[marks].takes(grammar(family, TOKENIZERS[marks]), text)
    read = [(call.name, json.loads(call.arguments)) for call in whole(ALL[family], text, SCHEMAS, stream=True).calls]
    assert read == calls


WEATHER = ("get_weather", {"city": "Z", "days": 1})


@pytest.mark.parametrize("marks", TOKENIZERS)
@pytest.mark.parametrize("family", FORMS)
def test_wrong_calls_are_refused(family: str, marks: str) -> None:
    tokenizer = TOKENIZERS[marks]
    for wrong in (
        ("nobody", {}),
        ("get_weather", {"city": "Z", "days": "many"}),
        ("get_weather", {"city": "Z"}),
        ("get_weather", {"city": "Z", "days": 1, "more": 1}),
        ("get_time", {"zone": 1}),
        ("get_weather", {"city": "Z", "days": 1, "places": [{"lon": 1}]}),
    ):
        assert not tokenizer.takes(grammar(family, tokenizer), written(family, [wrong])), wrong
    right = written(family, [WEATHER])
    assert tokenizer.takes(grammar(family, tokenizer, "get_weather", parallel=False), right)
    assert not tokenizer.takes(grammar(family, tokenizer, "get_time"), right)
    assert not tokenizer.takes(grammar(family, tokenizer), "Hello")
    assert not tokenizer.takes(grammar(family, tokenizer), "")
    if family not in ("harmony", "gemma", "generic"):
        twice = written(family, [WEATHER, WEATHER])
        assert tokenizer.takes(grammar(family, tokenizer), twice)
        assert not tokenizer.takes(grammar(family, tokenizer, parallel=False), twice)


@pytest.mark.parametrize("family", ["hermes", "qwen-xml", "mistral", "mistral-args", "deepseek", "harmony"])
def test_where_no_call_is_forced_text_is_free_and_calls_are_held(family: str) -> None:
    tokenizer = TOKENIZERS["marks are tokens"]
    free = grammar(family, tokenizer, forced=False)
    assert tokenizer.takes(free, written(family, [], text="Hello {<b>}\n\n```json\n").removesuffix("<|end|>"))
    assert tokenizer.takes(free, written(family, [WEATHER], text="Let me see."))
    if family != "mistral-args":  # its thoughts have marks of their own, which are no tokens here
        assert tokenizer.takes(free, written(family, [WEATHER], thoughts="hm", text="Let me see."))
    assert not tokenizer.takes(free, written(family, [("get_weather", {"city": "Z", "days": "many"})]))
    assert not tokenizer.takes(free, written(family, [("nobody", {})]))


@pytest.mark.parametrize("family", ["hermes", "gemma", "generic", "llama"])
def test_without_a_mark_that_is_a_token_text_is_not_held(family: str) -> None:
    assert call_grammar(ALL[family], [("get_time", None)], {}, forced=False) is None


@pytest.mark.parametrize("marks", TOKENIZERS)
def test_thoughts_that_the_prompt_opened_come_before_a_forced_call(marks: str) -> None:
    tokenizer = TOKENIZERS[marks]
    held = grammar("hermes", tokenizer, opened=True)
    assert tokenizer.takes(held, "hm\n</think>\n\n" + written("hermes", [WEATHER]))
    assert not tokenizer.takes(held, "hm\n</think>\n\nHello")
    assert not tokenizer.takes(held, written("hermes", [WEATHER]))


def test_every_form_of_calls_has_its_grammar_here() -> None:
    assert set(FORMS) == set(ALL)
    assert set(FORMS.values()) <= set(WRITE)
    assert TOOLS
