from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.core.aliases import Aliases, loop, mistakes, targets_of

NAMES = "abcdef"
TABLES = st.dictionaries(
    st.sampled_from(NAMES),
    st.sampled_from(NAMES + "xyz") | st.lists(st.sampled_from(NAMES + "xyz"), min_size=1, max_size=3, unique=True),
    max_size=6,
)


def test_an_alias_of_an_alias_leads_to_the_end() -> None:
    found = Aliases({"a": "b", "b": "c", "c": "x/y"})
    assert [found.first(name, ()) for name in "abc"] == ["x/y"] * 3
    assert found.leading_to("x/y") == ["a", "b", "c"]


def test_a_list_keeps_its_order_and_a_list_within_it_stands_where_it_is_named() -> None:
    found = Aliases({"smart": ["big", "both", "small"], "both": ["middle", "big"], "fast": "both"})
    assert found.exact["smart"] == ("big", "middle", "small")
    assert found.exact["fast"] == ("middle", "big")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("claude-opus-4", "smart"),
        ("claude-haiku-4-5", "small"),
        ("claude-haiku-4-5-fast", "tiny"),
        ("claude-opus-4-fast", "smart"),
        ("gpt-fast", "quick"),
        ("claude-", "smart"),
        ("claude-x", "exact"),
        ("gpt", "any"),
    ],
)
def test_what_is_exact_goes_before_a_pattern_and_a_longer_beginning_before_a_shorter(name: str, meant: str) -> None:
    table = {
        "*": "any",
        "claude-*": "smart",
        "claude-haiku-*": "small",
        "claude-haiku-*-fast": "tiny",
        "*-fast": "quick",
        "claude-x": "exact",
    }
    assert Aliases(table).first(name, ()) == meant


def test_a_beginning_and_an_end_do_not_share_letters() -> None:
    assert Aliases({"ab*ba": "x"}).match("aba") is None
    assert Aliases({"ab*ba": "x"}).match("abba") == ("x",)


def test_a_model_goes_before_a_pattern() -> None:
    assert Aliases({"*": "x"}).first("y", {"y"}) == "y"
    assert Aliases({"*": "x"}).first("z", {"y"}) == "x"


def _reached(alias: str, table: dict[str, str | list[str]]) -> set[str]:
    """Everything that an alias leads to, by the definition."""
    found: set[str] = set()
    ahead = set(targets_of(alias, table))
    while ahead - found:
        found |= ahead
        ahead = {target for name in found for target in targets_of(name, table)}
    return found


@given(TABLES)
def test_an_alias_has_a_loop_exactly_if_it_reaches_itself_and_the_way_is_a_way(
    table: dict[str, str | list[str]],
) -> None:
    for alias in table:
        way = loop(alias, table)
        assert (way is not None) == (alias in _reached(alias, table))
        if way is not None:
            assert way[0] == way[-1] == alias
            assert all(there in targets_of(here, table) for here, there in pairwise(way))


@given(TABLES)
def test_an_alias_without_loops_stands_for_all_models_that_it_reaches_once_each(
    table: dict[str, str | list[str]],
) -> None:
    found = Aliases(table)
    for alias in table:
        ends = found.exact[alias]
        assert set(ends) == {name for name in _reached(alias, table) if name not in table}
        assert len(set(ends)) == len(ends)
        assert all(alias in found.leading_to(end) for end in ends)
        first = targets_of(alias, table)[0]
        if not any(loop(a, table) for a in table):
            assert ends[0] == (found.exact[first][0] if first in table else first)


def test_many_ways_to_the_same_models_are_walked_once() -> None:
    table = {f"a{i}": [f"a{i + 1}", f"b{i + 1}"] for i in range(60)} | {f"b{i}": [f"a{i + 1}"] for i in range(60)}
    assert Aliases(table).exact["a0"] == ("a60", "b60")
    assert list(mistakes("a0", table)) == []
