"""docs/reference/responses.md has the three lists that the code has."""

from __future__ import annotations

import pytest
from tests.helpers.reference import listed

from helexa.core.dialects import responses_wire as wire


@pytest.mark.parametrize(
    ("heading", "names"),
    [("Honoured", wire.HONOURED), ("Dropped", frozenset(wire.DROPPED)), ("Refused", frozenset(wire.REFUSED))],
)
def test_each_list_is_documented(heading: str, names: frozenset[str]) -> None:
    assert listed("responses.md", heading) == names


def test_each_item_is_documented() -> None:
    assert listed("responses.md", "Items") == wire.ITEMS | {"web_search_call", "compaction", "configuration_update"}


def test_each_field_stands_on_one_list() -> None:
    lists = [wire.HONOURED, frozenset(wire.DROPPED), frozenset(wire.REFUSED)]
    assert sum(map(len, lists)) == len(frozenset().union(*lists)) == len(wire.Request.__struct_fields__)
