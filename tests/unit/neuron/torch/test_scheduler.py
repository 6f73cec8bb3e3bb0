"""What every step keeps to, over any arrivals: none starves, memory keeps its bounds, prefixes are the right ones."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.torch_steps import Slabs, next_token

from helexa.neuron.harness.torch.blocks import BLOCK, Chain, blocks_for
from helexa.neuron.harness.torch.scheduler import DECODE, TAIL, Plan, Scheduler, Sequence

VOCABULARY = 50
CONTEXT = 6 * BLOCK


@dataclass
class Asked:
    """A prompt: the first `shared` tokens of a text that all have in common, then tokens of its own."""

    shared: int
    own: int
    kind: int
    answer: int
    after: int  # steps before it arrives
    cancel: int | None  # steps after which it is cancelled
    hidden: bool = False

    def prompt(self) -> list[int]:
        common = [(i * 7) % VOCABULARY for i in range(self.shared)]
        return common + [(i * (self.kind + 2)) % VOCABULARY for i in range(self.own)]


asked = st.builds(
    Asked,
    shared=st.integers(0, 2 * BLOCK),
    own=st.integers(1, BLOCK),
    kind=st.integers(0, 2),
    answer=st.integers(1, 20) | st.integers(1, 3 * BLOCK),
    after=st.integers(0, 6),
    cancel=st.none() | st.integers(0, 12),
    hidden=st.sampled_from([False, False, False, True]),
)


class World:
    """A scheduler, the slabs it rules, and greedy answers."""

    def __init__(self, *, rows: int = 4, chunk: int = 64, kv_tokens: int = CONTEXT, ahead: int = 8) -> None:
        self.scheduler = Scheduler(rows=rows, chunk=chunk, kv_tokens=kv_tokens, context=CONTEXT, ahead=ahead)
        self.slabs = Slabs(kv_tokens)
        self.ends: dict[Sequence, int] = {}
        self.finished: list[Sequence] = []

    def add(self, prompt: list[int], answer: int, *, hidden: bool = False) -> Sequence:
        sequence = self.scheduler.add(prompt, hidden=hidden)
        self.ends[sequence] = len(prompt) + answer
        return sequence

    def step(self) -> Plan | None:
        plan = self.scheduler.plan()
        if plan is None:
            return None
        assert plan.parts, "a step that moves nothing"
        wanted = self.slabs.carry_out(plan.step)
        for part in plan.parts:
            s = part.sequence
            assert s.slab is not None
            assert self.slabs.held[s.slab.number] == s.chain.tokens[: s.done + part.count]
        self.scheduler.done(plan)
        for s in [p.sequence for p in plan.parts if p.wanted]:
            context = wanted.pop(0)
            assert context == s.chain.tokens
            if s.hidden:
                self.finish(s)
                continue
            self.scheduler.append(s, next_token(context, VOCABULARY))
            if len(s.chain) >= self.ends[s]:
                self.finish(s)
        self.check()
        return plan

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.finished.append(sequence)

    def run(self, most: int = 3000) -> int:
        for n in range(most):
            if self.step() is None:
                return n
        raise AssertionError("it does not end")

    def check(self) -> None:
        pool = self.scheduler.pool
        assert pool.used == sum(slab.blocks for slab in pool.slabs.values()) <= pool.capacity
        assert {s.slab.number for s in self.scheduler.running if s.slab} == {
            n for n, slab in pool.slabs.items() if slab.busy
        }
        assert len(self.scheduler.running) <= self.scheduler.rows
        for queue in (self.scheduler.running, self.scheduler.waiting):
            assert queue == sorted(queue)
        for value, holders in pool._index.items():
            assert holders
            for number, slab in holders.items():
                assert pool.slabs[number] is slab
                assert value in slab.chain.hashes(slab.held)


@settings(max_examples=150, deadline=None)
@given(st.lists(asked, min_size=1, max_size=8), st.integers(1, 4), st.sampled_from([1, 16, 100]), st.integers(6, 14))
def test_every_request_ends_with_its_own_answer_within_memory(
    requests: list[Asked], rows: int, chunk: int, blocks: int
) -> None:
    world = World(rows=rows, chunk=chunk, kv_tokens=blocks * BLOCK)
    coming = sorted(requests, key=lambda r: r.after)
    cancels: list[tuple[int, Sequence]] = []
    at = 0
    while coming or world.scheduler.running or world.scheduler.waiting:
        while coming and coming[0].after <= at:
            r = coming.pop(0)
            sequence = world.add(r.prompt(), r.answer, hidden=r.hidden)
            if r.cancel is not None:
                cancels.append((at + r.cancel, sequence))
        for when, sequence in cancels:
            if when <= at and sequence not in world.finished:
                world.finish(sequence)
        world.step()
        at += 1
        assert at < 20_000
    assert len(world.finished) == len(requests)
    cancelled = {sequence for _, sequence in cancels}
    for s in world.finished:
        assert s.hidden or s in cancelled or len(s.chain) == world.ends[s]
    assert not any(slab.busy for slab in world.scheduler.pool.slabs.values())


def test_a_second_turn_goes_on_from_the_first_ones_answer() -> None:
    world = World()
    first = world.add(list(range(40)) * 2, 30)
    world.run()
    second = world.add([*first.chain.tokens, 1, 2, 3], 4)
    world.run()
    assert second.cached == 80 + 30 - 1  # the last token of an answer is never computed


def test_a_second_turn_finds_room_in_the_slab_it_takes_over() -> None:
    world = World(kv_tokens=2 * CONTEXT, ahead=2 * BLOCK)
    first = world.add(list(range(40)) * 2, 30)
    plan = world.step()
    assert plan is not None
    room = plan.step.rows[0].room
    world.run()
    world.add([*first.chain.tokens, 1, 2, 3], 1)
    plan = world.step()
    assert plan is not None
    assert plan.step.rows[0].room == room  # so it is not moved


def test_answers_to_one_prompt_compute_it_once() -> None:
    world = World(kv_tokens=24 * BLOCK)
    prompt = [i % VOCABULARY for i in range(150)]
    answers = [world.add(prompt, 5) for _ in range(4)]
    computed = 0
    while (plan := world.step()) is not None:
        computed += sum(p.count for p in plan.parts)
    assert [s.cached for s in answers] == [0, 149, 149, 149]
    assert computed == 150 + 3 + 4 * 4


def test_a_shared_beginning_is_copied_and_the_other_conversation_kept() -> None:
    world = World(kv_tokens=24 * BLOCK)
    system = [i % VOCABULARY for i in range(2 * BLOCK)]
    one = world.add(system + [1] * 100, 10)
    world.run()
    two = world.add(system + [2] * 100, 10)
    world.run()
    again = world.add([*one.chain.tokens, 3], 2)
    world.run()
    assert two.cached == len(system)
    assert again.cached == len(system) + 100 + 9


def test_the_least_recently_used_entry_goes_first() -> None:
    world = World(kv_tokens=9 * BLOCK)
    old, new = ([kind] * (2 * BLOCK) for kind in (1, 2))
    world.add(old, 1)
    world.run()
    world.add(new, 1)
    world.run()
    world.add([3] * (3 * BLOCK), 1)
    world.run()
    assert world.add([*new, 9], 1)
    world.run()
    assert [s.cached for s in world.finished] == [0, 0, 0, 2 * BLOCK]
    again = world.add([*old, 9], 1)
    world.run()
    assert again.cached == 0


def test_a_preempted_sequence_ends_with_the_answer_it_would_have_had() -> None:
    tight, roomy = World(kv_tokens=CONTEXT), World(kv_tokens=10 * CONTEXT)
    for world in (tight, roomy):
        for kind in range(3):
            world.add([kind] * (BLOCK + 3), 3 * BLOCK)
        world.run()
    assert tight.scheduler.preemptions > 0
    assert roomy.scheduler.preemptions == 0
    texts = [sorted((s.number, s.chain.tokens) for s in world.finished) for world in (tight, roomy)]
    assert texts[0] == texts[1]


def test_a_preempted_sequence_gives_way_to_no_later_one() -> None:
    world = World(kv_tokens=CONTEXT, rows=2)
    first, second = (world.add([kind] * (2 * BLOCK), BLOCK * 3) for kind in range(2))
    third = world.add([9] * 10, 1)
    waited = False
    while first not in world.finished:
        world.step()
        if second in world.scheduler.waiting:
            waited = True
            assert third.slab is None
    assert waited
    world.run()
    assert set(world.finished) == {first, second, third}


def test_one_that_finds_no_room_is_not_overtaken() -> None:
    world = World(kv_tokens=CONTEXT)
    first = world.add([1] * (3 * BLOCK), 60)
    world.step()
    large, small = world.add([2] * (5 * BLOCK), 1), world.add([3] * 10, 1)
    while first not in world.finished:
        world.step()
        assert first in world.finished or small.slab is None
    world.run()
    assert set(world.finished) == {first, large, small}


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    world = World(kv_tokens=CONTEXT * 4, chunk=32)
    long = world.add([1] * (CONTEXT - 10), 1)
    short = world.add([2] * 30, 1)
    while short not in world.finished:
        world.step()
        assert long not in world.finished
    assert long.done > 0


def test_a_long_prompt_is_not_held_up_by_short_ones_for_ever() -> None:
    world = World(kv_tokens=CONTEXT * 4, chunk=32, rows=4)
    long = world.add([1] * (CONTEXT - 10), 1)
    steps = 0
    while long not in world.finished:
        world.add([2 + steps % 40] * 30, 1)
        world.step()
        steps += 1
        assert steps <= -(-CONTEXT // 16)


def test_answers_go_on_in_every_step_beside_a_prefill() -> None:
    world = World(kv_tokens=CONTEXT * 4, chunk=16)
    answer = world.add([1] * 20, 40)
    world.step()
    world.step()
    world.add([2] * 200, 1)
    for n in range(5):
        before = len(answer.chain)
        plan = world.step()
        assert plan is not None
        assert len(answer.chain) == before + 1, n
        assert sum(p.count for p in plan.parts if p.count > DECODE) <= 16 + 16 // TAIL


def test_both_kinds_take_turns_and_never_share_a_step() -> None:
    world = World(kv_tokens=CONTEXT * 4)
    world.add([1] * 20, 5)
    world.add([2] * 20, 0, hidden=True)
    kinds = []
    while (plan := world.step()) is not None:
        assert {p.sequence.hidden for p in plan.parts} == {plan.step.hidden}
        kinds.append(plan.step.hidden)
    assert kinds.count(True) == 1


def test_an_embedding_of_every_token_wants_all_of_its_chunks() -> None:
    scheduler = Scheduler(rows=1, chunk=16, kv_tokens=CONTEXT, context=CONTEXT)
    sequence = scheduler.add([1] * 40, hidden=True, every=True)
    wanted = 0
    while sequence.pending:
        plan = scheduler.plan()
        assert plan is not None
        scheduler.done(plan)
        wanted += sum(p.wanted for p in plan.parts)
    assert wanted == 40


def test_what_a_restart_leaves_is_computed_anew() -> None:
    world = World(kv_tokens=CONTEXT * 2)
    sequences = [world.add([kind] * 100, 40) for kind in range(3)]
    for _ in range(20):
        world.step()
    world.scheduler.restart(CONTEXT)
    world.slabs.kv_tokens = CONTEXT
    assert world.scheduler.waiting == sequences
    world.run()
    for s in sequences:
        for n in range(100, 140):
            assert s.chain.tokens[n] == next_token(s.chain.tokens[:n], VOCABULARY)


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40))
def test_what_two_chains_have_in_common_is_their_longest_common_beginning(
    a: list[int], b: list[int], most: int
) -> None:
    n = 0
    while n < min(len(a), len(b), most) and a[n] == b[n]:
        n += 1
    assert Chain(a).common(Chain(b), most) == n


@given(st.integers(0, 1000))
def test_blocks_hold_their_tokens_and_no_block_more(tokens: int) -> None:
    assert 0 <= blocks_for(tokens) * BLOCK - tokens < BLOCK


def test_two_chains_share_hashes_up_to_where_they_part() -> None:
    a, b = Chain(range(3 * BLOCK)), Chain([*range(2 * BLOCK), *range(BLOCK)])
    assert a.hashes(3 * BLOCK)[:2] == b.hashes(3 * BLOCK)[:2]
    assert a.hashes(3 * BLOCK)[2] != b.hashes(3 * BLOCK)[2]
    assert len(a.hashes(3 * BLOCK - 1)) == 2


def test_the_short_end_of_a_prompt_is_no_step_of_its_own() -> None:
    world = World(chunk=32)
    world.add([1] * (32 + 40), 1)
    assert [sum(p.count for p in plan.parts) for plan in iter(world.step, None) if plan] == [32, 40]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_is_computed_in_chunks_and_only_the_last_is_answered(chunk: int) -> None:
    world = World(chunk=chunk)
    world.add([1] * 65, 1)
    wanted = []
    while (plan := world.step()) is not None:
        wanted += [p.wanted for p in plan.parts]
    assert wanted == [0] * (len(wanted) - 1) + [1]
