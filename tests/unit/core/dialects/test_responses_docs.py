"""docs/reference/responses.md has the three lists that the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helexa.core.dialects import responses_wire as wire

PAGE = (Path(__file__).parents[4] / "docs/reference/responses.md").read_text()


def listed(heading: str) -> set[str]:
    """Code in the first column of the table under a heading."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n#", 1)[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)}


@pytest.mark.parametrize(
    ("heading", "names"),
    [("Honoured", wire.HONOURED), ("Dropped", frozenset(wire.DROPPED)), ("Refused", frozenset(wire.REFUSED))],
)
def test_each_list_is_documented(heading: str, names: frozenset[str]) -> None:
    assert listed(heading) == names


def test_each_item_is_documented() -> None:
    assert listed("Items") == wire.ITEMS | {"web_search_call", "compaction", "configuration_update"}


def test_each_field_stands_on_one_list() -> None:
    lists = [wire.HONOURED, frozenset(wire.DROPPED), frozenset(wire.REFUSED)]
    assert sum(map(len, lists)) == len(frozenset().union(*lists)) == len(wire.Request.__struct_fields__)
