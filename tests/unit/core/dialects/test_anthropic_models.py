"""The list of models as the SDK reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types import ModelInfo

from helexa.core.dialects.anthropic_models import model, page
from helexa.core.errors import BadRequest

ENTRY: dict[str, Any] = {"id": "a/b", "created": 1764000000, "max_model_len": 4096, "capabilities": ["chat", "vision"]}
ENTRIES = [{**ENTRY, "id": name} for name in "abcde"]


@pytest.mark.parametrize("entry", [ENTRY, {"id": "x", "created": 0}, {**ENTRY, "capabilities": []}])
def test_an_entry_is_strictly_of_the_sdk_s_type(entry: dict[str, Any]) -> None:
    told = model(entry)
    parsed = ModelInfo.model_validate_json(json.dumps(told), strict=True)
    assert parsed.model_dump(mode="json", exclude_unset=True) == told
    assert not parsed.model_extra


def test_what_is_not_known_is_left_out() -> None:
    assert "max_tokens" not in model({"id": "x", "created": 0})
    assert model(ENTRY)["capabilities"]["image_input"] == {"supported": True}
    assert model(ENTRY)["capabilities"]["thinking"]["supported"] is False


@pytest.mark.parametrize(
    ("query", "ids", "more"),
    [
        ({}, "abcde", False),
        ({"limit": "2"}, "ab", True),
        ({"limit": "2", "after_id": "b"}, "cd", True),
        ({"limit": "2", "after_id": "c"}, "de", False),
        ({"after_id": "e"}, "", False),
        ({"limit": "2", "before_id": "d"}, "bc", True),
        ({"limit": "9", "before_id": "d"}, "abc", False),
    ],
)
def test_pages(query: dict[str, str], ids: str, more: bool) -> None:
    told = page(ENTRIES, query)
    assert "".join(entry["id"] for entry in told["data"]) == ids
    assert told["has_more"] is more
    assert (told["first_id"], told["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))


@pytest.mark.parametrize(
    "query", [{"limit": "0"}, {"limit": "1001"}, {"limit": "x"}, {"limit": "9" * 5000}, {"after_id": "z"}]
)
def test_a_query_that_makes_no_sense_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(BadRequest):
        page(ENTRIES, query)
