"""JSON bodies of management requests into their types, with the field at fault in the error."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from helexa.core.errors import BadRequest, nearest

T = TypeVar("T")


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """decoder: of a Struct. Raises BadRequest."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as err:
        raise _bad_field(str(err), decoder) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise BadRequest(f"The body is not JSON: {err}") from None


def _bad_field(text: str, decoder: msgspec.json.Decoder[Any]) -> BadRequest:
    """msgspec's "Expected `int`, got `str` - at `$.context`", with the field named as `param` too."""
    what, _, where = text.partition(" - at `$")
    param = where.rstrip("`").lstrip(".") or None
    if param is not None:
        return BadRequest(f"{param}: {what[:1].lower()}{what[1:]}", param=param)
    if "unknown field" in text:
        param = text.split("`")[1]
        near = nearest(param, list(decoder.type.__struct_fields__))
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return BadRequest(f"`{param}` is not a field of this request{hint}", param=param)
    return BadRequest(f"The body is wrong: {text}")
