"""Grammars through llguidance: only what they allow can be chosen, and a bad one is the request's error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import torch_tokenizers as kinds

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'helexa[torch]'")
np = pytest.importorskip("numpy")

from helexa.core.errors import BadRequest  # noqa: E402
from helexa.neuron.harness.torch.detokenise import Detokeniser, Vocabulary  # noqa: E402
from helexa.neuron.harness.torch.grammar import Grammars, Matcher  # noqa: E402
from helexa.neuron.harness.torch.request import Grammar, Sampling  # noqa: E402
from helexa.neuron.harness.torch.sampling import Chooser  # noqa: E402

TOKENIZER = kinds.byte_level()
SIZE = TOKENIZER.get_vocab_size() + 10  # a model has more rows than tokens
EOS = (0, 2)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, SIZE, EOS)


def babble(matcher: Matcher, seed: int, most: int = 300) -> tuple[str, bool]:
    """What a model writes that knows nothing; whether it came to an end."""
    rng = np.random.default_rng(seed)
    chooser = Chooser(Sampling(), (), SIZE, seed)
    text, out = Detokeniser(Vocabulary(TOKENIZER)), ""
    for n in range(most):
        token = chooser.choose(rng.standard_normal(SIZE).astype(np.float32), n, matcher.allowed())
        if token in EOS:
            return out, True
        matcher.took(token)
        out += text.feed(token)
        if matcher.ended:
            return out, True
    return out, False


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_even_babble_keeps_to_a_schema(seed: int) -> None:
    text, ended = babble(Grammars(TOKENIZER, SIZE, EOS).matcher(Grammar("json_schema", json.dumps(SCHEMA))), seed)
    assert ended
    value = json.loads(text)
    assert value.keys() == {"name", "age"}
    assert isinstance(value["name"], str)
    assert value["age"] <= 99


def test_json_object_begins_as_one(grammars: Grammars) -> None:
    for seed in range(5):
        text, ended = babble(grammars.matcher(Grammar("json_object")), seed, 100)
        assert text.lstrip().startswith("{")
        if ended:
            assert isinstance(json.loads(text), dict)


def test_a_regular_expression_and_a_lark_grammar_hold(grammars: Grammars) -> None:
    for seed in range(10):
        assert babble(grammars.matcher(Grammar("regex", "(cat|dog)s?")), seed)[0] in {"cat", "cats", "dog", "dogs"}
        lark = 'start: "get(" ARG ")"\nARG: /[0-9]{1,3}/'
        text, _ = babble(grammars.matcher(Grammar("lark", lark)), seed)
        assert text.startswith("get(")
        assert text.endswith(")")


def test_a_grammar_that_can_only_end_says_so(grammars: Grammars) -> None:
    matcher = grammars.matcher(Grammar("regex", "a"))
    token = TOKENIZER.encode("a").ids[0]
    assert np.flatnonzero(matcher.allowed()).tolist() == [token]
    matcher.took(token)
    assert matcher.ended or set(np.flatnonzero(matcher.allowed()).tolist()) <= set(EOS)


def test_every_end_token_is_allowed_where_the_grammar_may_end(grammars: Grammars) -> None:
    matcher = grammars.matcher(Grammar("regex", "a*"))
    assert set(EOS) <= set(np.flatnonzero(matcher.allowed()).tolist())


def test_two_answers_to_one_grammar_do_not_meet(grammars: Grammars) -> None:
    one, two = (grammars.matcher(Grammar("regex", "ab")) for _ in range(2))
    one.took(TOKENIZER.encode("a").ids[0])
    assert one.allowed().tolist() != two.allowed().tolist()


BAD: list[tuple[Any, str]] = [
    (Grammar("json_schema", "{"), "JSON schema"),
    (Grammar("json_schema", '{"type": "no such type"}'), "JSON schema"),
    (Grammar("json_schema", '{"$ref": "#/$defs/none"}'), "JSON schema"),
    (Grammar("json_schema", '{"type": "string", "pattern": "("}'), "JSON schema"),
    (Grammar("lark", "start: nothing"), "Lark grammar"),
    (Grammar("lark", "gibberish ("), "Lark grammar"),
    (Grammar("regex", "("), "regular expression"),
]


@pytest.mark.parametrize(("grammar", "what"), BAD)
def test_a_bad_grammar_is_the_requests_error_and_names_its_field(
    grammars: Grammars, grammar: Grammar, what: str
) -> None:
    with pytest.raises(BadRequest, match=what) as caught:
        grammars.matcher(grammar)
    assert caught.value.param == "response_format"
