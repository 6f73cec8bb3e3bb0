"""docs/reference/ollama.md has the lists that the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helexa.core.dialects import ollama_wire as wire

PAGE = (Path(__file__).parents[4] / "docs/reference/ollama.md").read_text()
PLACES = {
    "everywhere": list(wire.HONOURED),
    "chat": ["/api/chat"],
    "generate": ["/api/generate"],
    "embed": ["/api/embed"],
    "embeddings": ["/api/embeddings"],
}


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading whose first one is code."""
    section = PAGE.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]


def names(cell: str) -> list[str]:
    return re.findall(r"`([a-z_0-9]+)`", cell)


def listed(heading: str) -> set[tuple[str, str]]:
    """(path, field) of each row."""
    return {
        (path, name)
        for first, where, *_ in rows(heading)
        for name in names(first)
        for place in where.split(", ")
        for path in PLACES[place.strip(" |")]
    }


@pytest.mark.parametrize(
    ("heading", "table"), [("Honoured", wire.HONOURED), ("Dropped", wire.DROPPED), ("Refused", wire.REFUSED)]
)
def test_each_list_is_documented_for_each_endpoint(heading: str, table: dict[str, frozenset[str]]) -> None:
    assert listed(heading) == {(path, name) for path, fields in table.items() for name in fields}


def test_each_option_is_documented() -> None:
    told = {name: " ".join(cells[1:]) for cells in rows("Options") for name in names(cells[0])}
    assert set(told) == set(wire.Options.__struct_fields__)
    assert {name for name, how in told.items() if how.startswith("Dropped")} == set(wire.DROPPED_OPTIONS)


def test_every_field_that_is_read_stands_on_a_list() -> None:
    for path, kind in zip(wire.HONOURED, (wire.Chat, wire.Generate, wire.Embed, wire.Embeddings), strict=True):
        known = {*wire.HONOURED[path], *wire.DROPPED[path], *wire.REFUSED.get(path, ())}
        assert set(kind.__struct_fields__) == known
