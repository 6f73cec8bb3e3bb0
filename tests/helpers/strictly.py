"""What we send, against a client package's own pydantic types: of the right type, and nothing that they do not know."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from pydantic import BaseModel


def strictly(kind: type[BaseModel], data: Any, *, beside: Collection[str] = ()) -> None:
    """beside: dotted paths of members that the type lacks and that are sent on purpose. AssertionError, or pydantic's
    own error, where `data` is anything else than the type says."""
    parsed = kind.model_validate_json(json.dumps(data), strict=True)
    told = parsed.model_dump(mode="json", exclude_unset=True, by_alias=True)
    unknown = {*_extras(parsed, ""), *_lost(told, data, "")} - set(beside)
    assert not unknown, f"the client's type has no {', '.join(sorted(unknown))}"


def _extras(parsed: Any, where: str) -> Iterator[str]:
    """Members that a type which allows them took without knowing them."""
    if isinstance(parsed, BaseModel):
        for name in parsed.model_extra or ():
            yield f"{where}{name}"
        for name in type(parsed).model_fields:
            yield from _extras(getattr(parsed, name), f"{where}{name}.")
    elif isinstance(parsed, list | tuple):
        for item in parsed:
            yield from _extras(item, where)


def _lost(told: Any, sent: Any, where: str) -> Iterator[str]:
    """Members that a type which ignores them let fall. What is there has to be what was sent."""
    if isinstance(sent, dict) and isinstance(told, dict):
        for key, value in sent.items():
            if key in told:
                yield from _lost(told[key], value, f"{where}{key}.")
            else:
                yield f"{where}{key}"
    elif isinstance(sent, list) and isinstance(told, list):
        for one, other in zip(told, sent, strict=True):
            yield from _lost(one, other, where)
    elif not isinstance(told, str):  # times are parsed; that they parse is what counts
        assert told == sent, f"{where}: {sent!r} was read as {told!r}"
