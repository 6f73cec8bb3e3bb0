from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.neuron.harness.splice import members, prepend, splice

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=5) | st.sampled_from(["stream", "n", 'a"b', "\\"]), VALUES, max_size=6)
STYLES = st.sampled_from(
    [
        {"indent": 2},
        {"separators": (",", ":")},
        {"separators": (" , ", " : ")},
        {"ensure_ascii": False},
        {"indent": "\t"},
    ]
)


@settings(deadline=None)
@given(OBJECTS, STYLES)
def test_every_member_is_found_with_its_exact_span(value: dict[str, Any], style: dict[str, Any]) -> None:
    body = json.dumps(value, **style).encode()
    found = {key: json.loads(body[start:end]) for key, start, end in members(body)}
    assert found == value
    assert all(body[start:end] == body[start:end].strip() for _, start, end in members(body))


@settings(deadline=None)
@given(OBJECTS, STYLES, st.dictionaries(st.sampled_from(["stream", "n", "new", "messages"]), VALUES, max_size=3))
def test_a_splice_sets_what_it_names_and_nothing_else(
    value: dict[str, Any], style: dict[str, Any], values: dict[str, Any]
) -> None:
    body = json.dumps(value, **style).encode()
    spliced = splice(body, {key: json.dumps(v).encode() for key, v in values.items()})
    assert json.loads(spliced) == value | values


def test_numbers_escapes_and_spaces_elsewhere_stay_as_they_were() -> None:
    body = b' {"temperature":1.50e0 , "stream" : false,"t":"\\u00e9 }\\"{", "n":12345678901234567890123}\n'
    assert splice(body, {"stream": b"true", "v": b"[]"}) == (
        b' {"v":[],"temperature":1.50e0 , "stream" : true,"t":"\\u00e9 }\\"{", "n":12345678901234567890123}\n'
    )


def test_a_key_that_stands_twice_or_is_written_with_escapes_is_set_everywhere() -> None:
    assert splice(b'{"n":1,"\\u006e":2}', {"n": b"3"}) == b'{"n":3,"\\u006e":3}'


def test_the_keys_of_inner_objects_are_not_taken_for_the_bodys() -> None:
    assert splice(b'{"a":{"n":1},"b":[{"n":2}]}', {"n": b"3"}) == b'{"n":3,"a":{"n":1},"b":[{"n":2}]}'


def test_an_empty_object_gets_no_comma() -> None:
    assert prepend(b"{ }", {"n": b"3"}) == b'{"n":3 }'
