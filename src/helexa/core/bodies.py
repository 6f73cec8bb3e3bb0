"""JSON bodies into their types, with the field at fault in the error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

from helexa.core.errors import BadRequest, nearest

T = TypeVar("T")

# The most that one request lists, in any dialect whose lists are read here: a list is walked on the loop, which serves
# nobody else meanwhile. No client comes near.
MAX_MESSAGES: Final = 10_000
MAX_TOOLS: Final = 1_000

# All that msgspec raises for a body: ValueError is a string that is no UTF-8, RecursionError one nested too deep.
NOT_JSON: Final = (msgspec.MsgspecError, ValueError, RecursionError)


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """decoder: of a Struct. Raises BadRequest."""
    try:
        body.decode()  # what a type skips, or keeps as it came, is not looked into
        return decoder.decode(body)
    except NOT_JSON as err:
        fields: tuple[str, ...] = getattr(decoder.type, "__struct_fields__", ())
        raise explain(err, fields) from None


def explain(err: Exception, fields: Sequence[str] = ()) -> BadRequest:
    """One of NOT_JSON for the caller. msgspec ends its messages with the path: "Expected `int`, got `str` - at
    `$.context`", which becomes `param` too. fields: the names that an unknown one may have meant."""
    text = str(err)
    if not isinstance(err, msgspec.ValidationError):
        return BadRequest(f"The body is not valid JSON: {text}")
    what, _, where = text.partition(" - at `$")
    what = f"{what[:1].lower()}{what[1:]}"
    param = where.rstrip("`").lstrip(".") or None
    if param is not None:
        return BadRequest(f"`{param}`: {what}", param=param)
    if "unknown field" in text:
        param = text.split("`")[1]
        near = nearest(param, list(fields))
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return BadRequest(f"`{param}` is not a field of this request{hint}", param=param)
    return BadRequest(f"The body is not what was expected: {what}")


def try_decode(decoder: msgspec.json.Decoder[T], data: bytes) -> T | None:
    """None for what is not JSON or not of the type."""
    try:
        return decoder.decode(data)
    except NOT_JSON:
        return None
