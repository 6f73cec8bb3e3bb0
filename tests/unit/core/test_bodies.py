"""Management bodies: what is wrong is named, whatever a client sends."""

from __future__ import annotations

import msgspec
import pytest

from helexa.core.bodies import decode
from helexa.core.errors import BadRequest


class Order(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    slots: int = 1


ORDER = msgspec.json.Decoder(Order)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b'{"model": 5}', "model", "expected `str`, got `int`"),
        (b'{"model": "m", "slots": "x"}', "slots", "expected `int`"),
        (b'{"modle": "m"}', "modle", "did you mean `model`?"),
        (b"{}", None, "missing required field `model`"),
        (b'"text"', None, "xpected `object`"),
        (b"{", None, "not valid JSON"),
        (b"", None, "not valid JSON"),
        (b'{"model": "\xff"}', None, "not valid JSON"),
        (b'{"model": "m", "slots": 1, "skipped": "\xff"}', None, "not valid JSON"),
        (b"[" * 100_000, None, "The body is"),
    ],
)
def test_a_wrong_body_is_refused_naming_the_field(body: bytes, param: str | None, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        decode(ORDER, body)
    assert words in caught.value.message
    assert caught.value.param == param


def test_a_right_body_is_its_type() -> None:
    assert decode(ORDER, b'{"model": "m"}') == Order("m")
