"""docs/reference/anthropic.md has the three lists that the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helexa.core.dialects import anthropic_wire as wire

PAGE = (Path(__file__).parents[4] / "docs/reference/anthropic.md").read_text()


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


def test_each_block_is_documented() -> None:
    assert listed("Content blocks") == wire.BLOCKS | {"redacted_thinking", "server_tool_use"}
