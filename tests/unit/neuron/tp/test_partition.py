"""Which rank holds what: every row once, shares kept."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.neuron.tp.partition import Impossible, Shape, Span, deal, partition, possible_world_sizes, thread_shares

SMOLLM2 = Shape(query_heads=9, kv_heads=3, mlp=1536, vocabulary=49152)

shapes = st.builds(
    lambda groups, per_group, mlp, vocabulary, experts: Shape(groups * per_group, groups, mlp, vocabulary, experts),
    st.integers(1, 16),
    st.integers(1, 8),
    st.integers(0, 20_000),
    st.integers(1, 200_000),
    st.integers(0, 128),
)


@st.composite
def splits(draw: Callable[..., object]) -> tuple[Shape, int, list[float] | None]:
    shape = draw(shapes)
    assert isinstance(shape, Shape)
    world = draw(st.integers(1, min(8, shape.query_heads)))
    assert isinstance(world, int)
    weights = draw(st.none() | st.lists(st.floats(0.1, 100), min_size=world, max_size=world))
    return shape, world, weights  # type: ignore[return-value]


def cover(spans: list[Span], size: int) -> bool:
    """Side by side, from 0 to size, without a gap or an overlap."""
    return (
        spans[0].start == 0
        and spans[-1].stop == size
        and all(a.stop == b.start for a, b in pairwise(spans))
        and all(s.size >= 0 for s in spans)
    )


@given(splits())
def test_every_row_is_held_by_one_rank(split: tuple[Shape, int, list[float] | None]) -> None:
    shape, world, weights = split
    shares = partition(shape, world, weights)
    assert len(shares) == world
    assert cover([s.query_heads for s in shares], shape.query_heads)
    assert cover([s.mlp for s in shares], shape.mlp)
    assert cover([s.vocabulary for s in shares], shape.vocabulary)
    assert cover([s.experts for s in shares], shape.experts)
    assert all(s.query_heads.size >= 1 for s in shares)


@given(splits())
def test_a_rank_holds_the_kv_heads_that_its_query_heads_read_and_no_other(
    split: tuple[Shape, int, list[float] | None],
) -> None:
    shape, world, weights = split
    per_group = shape.query_heads // shape.kv_heads
    for share in partition(shape, world, weights):
        heads = range(share.query_heads.start, share.query_heads.stop)
        assert {head // per_group for head in heads} == set(range(share.kv_heads.start, share.kv_heads.stop))
    if shape.kv_heads >= world:
        shares = partition(shape, world, weights)
        assert cover([s.kv_heads for s in shares], shape.kv_heads), "whole groups: no KV head is copied"


@given(count=st.integers(0, 10_000), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_what_is_dealt_out_is_all_there_is_and_within_one_of_the_exact_share(count: int, weights: list[float]) -> None:
    got = deal(count, weights)
    assert sum(got) == count
    for share, weight in zip(got, weights, strict=True):
        assert abs(share - count * weight / sum(weights)) < 1 + 1e-6


@pytest.mark.parametrize(
    ("world", "weights", "heads"),
    [(3, None, [3, 3, 3]), (2, None, [6, 3]), (2, [1, 2], [3, 6]), (4, None, [3, 2, 2, 2])],
)
def test_smollm2_is_split_in_kv_groups_and_beyond_three_ranks_in_heads(
    world: int, weights: list[float] | None, heads: list[int]
) -> None:
    assert [s.query_heads.size for s in partition(SMOLLM2, world, weights)] == heads


def test_ties_go_to_the_lower_rank() -> None:
    assert deal(4, [1, 1, 1]) == [2, 1, 1]


def test_an_impossible_split_is_refused_with_the_sizes_that_work() -> None:
    with pytest.raises(Impossible, match="the model has 9; use 1 to 9"):
        partition(SMOLLM2, 10)
    with pytest.raises(Impossible, match="shares over 0"):
        partition(SMOLLM2, 2, [1, 0])
    with pytest.raises(Impossible, match="2 ranks need 2 shares"):
        partition(SMOLLM2, 2, [1])
    assert possible_world_sizes(SMOLLM2, 16) == list(range(1, 10))


def test_threads_are_shared_out_and_every_rank_has_one() -> None:
    assert thread_shares(8, 3) == [3, 3, 2]
    assert thread_shares(1, 3) == [1, 1, 1]
