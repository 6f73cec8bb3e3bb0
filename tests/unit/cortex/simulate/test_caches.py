from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from helexa.cortex.simulate.caches import Pool, Slots

PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)


def ids(path: tuple[int, ...]) -> list[int]:
    return [hash(path[: at + 1]) for at in range(len(path))]


def ends(path: tuple[int, ...]) -> list[int]:
    return [10 * (at + 1) for at in range(len(path))]


@given(sent=st.lists(PATHS, max_size=30), asked=PATHS)
def test_a_large_pool_has_the_longest_beginning_it_saw(sent: list[tuple[int, ...]], asked: tuple[int, ...]) -> None:
    pool = Pool(10_000)
    for path in sent:
        pool.keep(ids(path), ends(path))
    known = {prefix for path in sent for prefix in ids(path)}
    assert pool.held(ids(asked), ends(asked)) == 10 * sum(prefix in known for prefix in ids(asked))


@given(sent=st.lists(PATHS, min_size=1, max_size=30))
def test_a_small_pool_keeps_what_came_last(sent: list[tuple[int, ...]]) -> None:
    pool = Pool(50)
    for path in sent:
        pool.keep(ids(path), ends(path))
    assert pool.held(ids(sent[-1]), ends(sent[-1])) == 10 * len(sent[-1])


def test_a_request_takes_the_slot_that_shares_most_with_it() -> None:
    slots = Slots(2)
    for path in ((1, 1), (2, 2), (1, 1, 1)):
        slots.keep(ids(path), ends(path))
    assert slots.held(ids((2, 2, 2)), ends((2, 2, 2))) == 20
    assert slots.held(ids((1, 1, 1, 1)), ends((1, 1, 1, 1))) == 30


def test_a_stranger_takes_the_slot_used_longest_ago() -> None:
    slots = Slots(2)
    for path in ((1, 1), (2, 2), (3, 3)):
        slots.keep(ids(path), ends(path))
    assert [slots.held(ids(path), ends(path)) for path in ((1, 1), (2, 2), (3, 3))] == [0, 20, 20]
