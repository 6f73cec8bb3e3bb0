"""What we send, against a client package's own pydantic types: of the right type, and nothing that they do not know."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel


def strictly(kind: type[BaseModel], data: Any, *, beside: Collection[str] = ()) -> None:
    """beside: dotted paths of members that the type lacks and that are sent on purpose. AssertionError, or pydantic's
    own error, where `data` is anything else than the type says."""
    parsed = kind.model_validate_json(json.dumps(data), strict=True)
    told = parsed.model_dump(mode="json", exclude_unset=True, by_alias=True)
    _compare(told, data, "", frozenset(beside))


def _compare(told: Any, sent: Any, where: str, beside: frozenset[str]) -> None:
    if isinstance(sent, dict) and isinstance(told, dict):
        for key, value in sent.items():
            path = f"{where}.{key}" if where else key
            if key in told:
                _compare(told[key], value, path, beside)
            else:
                assert path in beside, f"{path} is no member of the client's type"
    elif isinstance(sent, list) and isinstance(told, list):
        for one, other in zip(told, sent, strict=True):
            _compare(one, other, where, beside)
    elif not isinstance(told, str):  # times are parsed; that they parse is what counts
        assert told == sent, f"{where}: {sent!r} was read as {told!r}"
