"""The accounting of slabs by itself."""

from __future__ import annotations

from helexa.neuron.harness.torch.blocks import BLOCK, Chain, Opened, Pool


def opened(pool: Pool, tokens: list[int], *, room: int = 0, spare: int = 0) -> Opened:
    found = pool.open(Chain(tokens), room=room, spare=spare)
    assert found is not None
    return found


def computed(pool: Pool, tokens: list[int]) -> Opened:
    """As a sequence that ran and ended."""
    found = opened(pool, tokens)
    pool.hold(found.slab, len(tokens))
    pool.close(found.slab, keep=True)
    pool.begin()
    return found


def test_an_adopted_slab_holds_only_what_was_kept_of_it() -> None:
    pool = Pool(8 * BLOCK)
    computed(pool, [1] * 150)
    other = [*([1] * 146), 2, 2, 2, 2]
    adopted = opened(pool, other)
    assert (adopted.cached, adopted.copy) == (146, None)
    again = opened(pool, other)
    assert again.copy is not None
    assert again.copy.tokens == again.cached == 146  # the rest is not computed yet


def test_the_spare_is_had_by_letting_idle_slabs_go_or_there_is_no_room() -> None:
    pool = Pool(4 * BLOCK)
    computed(pool, [1] * (2 * BLOCK))
    assert pool.open(Chain([2] * (2 * BLOCK)), spare=3) is None
    assert pool.used == 2
    opened(pool, [2] * (2 * BLOCK), spare=2)
    assert pool.open(Chain([3] * (2 * BLOCK)), spare=1) is None


def test_room_ahead_is_charged_from_the_beginning() -> None:
    pool = Pool(8 * BLOCK)
    slab = opened(pool, [1] * 10, room=3 * BLOCK).slab
    assert pool.used == slab.blocks == 3
    assert pool.grow(slab, 3 * BLOCK, 3 * BLOCK)
    assert pool.used == 3


def test_a_slab_grows_by_more_than_it_must_only_where_memory_is_free() -> None:
    pool = Pool(20 * BLOCK)
    slab = opened(pool, [1] * (8 * BLOCK)).slab
    assert pool.grow(slab, 8 * BLOCK + 1, 100 * BLOCK)
    assert slab.blocks == 11
    computed(pool, [2] * (8 * BLOCK))
    assert pool.grow(slab, 11 * BLOCK + 1, 100 * BLOCK)
    assert slab.blocks == 12  # the last block of the memory, though the slab that is idle could go
    assert len(pool.slabs) == 2
    assert pool.take_drops() == []
    assert pool.grow(slab, 12 * BLOCK + 1, 100 * BLOCK)
    assert pool.take_drops() == [2]
    assert not pool.grow(slab, 20 * BLOCK + 1, 100 * BLOCK)


def test_an_adopted_slab_with_some_room_is_not_grown_at_once() -> None:
    pool = Pool(20 * BLOCK)
    first = opened(pool, [1] * 100, room=5 * BLOCK)
    pool.hold(first.slab, 100)
    pool.close(first.slab, keep=True)
    pool.begin()
    second = opened(pool, [*([1] * 100), *([2] * 100)], room=9 * BLOCK)
    assert second.slab is first.slab
    assert second.slab.blocks == 5


def test_one_of_less_than_a_block_is_not_kept() -> None:
    pool = Pool(8 * BLOCK)
    computed(pool, [1] * (BLOCK - 1))
    assert pool.used == 0
    assert pool.take_drops() == [1]


def test_a_copy_is_made_where_adopting_would_lose_much() -> None:
    pool = Pool(40 * BLOCK)
    computed(pool, [*([1] * 200), *([2] * 400)])
    branch = opened(pool, [*([1] * 200), *([3] * 50)])
    assert branch.copy is not None
    assert branch.copy.room == branch.slab.blocks * BLOCK
    assert len(pool.slabs) == 2


def test_what_a_copy_comes_from_stays_until_it_is_made() -> None:
    pool = Pool(10 * BLOCK)
    source = computed(pool, [*([1] * 2 * BLOCK), *([2] * 2 * BLOCK)]).slab
    opened(pool, [*([1] * 2 * BLOCK), *([3] * BLOCK)])  # 3 blocks by copy
    assert pool.open(Chain([4] * (4 * BLOCK))) is None
    assert source.number in pool.slabs
    pool.begin()
    assert pool.open(Chain([4] * (4 * BLOCK))) is not None
    assert source.number not in pool.slabs
