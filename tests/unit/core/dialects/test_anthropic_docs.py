"""docs/reference/anthropic.md has the three lists that the code has."""

from __future__ import annotations

import pytest
from tests.helpers.reference import listed

from helexa.core.dialects import anthropic_wire as wire


@pytest.mark.parametrize(
    ("heading", "names"),
    [("Honoured", wire.HONOURED), ("Dropped", frozenset(wire.DROPPED)), ("Refused", frozenset(wire.REFUSED))],
)
def test_each_list_is_documented(heading: str, names: frozenset[str]) -> None:
    assert listed("anthropic.md", heading) == names


def test_each_block_is_documented() -> None:
    assert listed("anthropic.md", "Content blocks") == wire.BLOCKS | {"redacted_thinking", "server_tool_use"}
