from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helexa.neuron.memory import Claim, DoesNotFit, Ledger


def test_a_claim_counts_from_its_reservation_until_its_release() -> None:
    ledger = Ledger({0: 1000})
    claim = ledger.reserve("a", {0: 600}, {0: None})
    assert ledger.used_mb(0) == 600
    assert ledger.free_mb(0, None) == 400
    claim.release()
    claim.release()
    assert ledger.free_mb(0, None) == 1000


def test_left_without_keep_a_claim_is_given_back() -> None:
    ledger = Ledger({0: 1000})
    with pytest.raises(RuntimeError), ledger.reserve("a", {0: 600}, {}):
        raise RuntimeError
    assert ledger.used_mb(0) == 0
    with ledger.reserve("a", {0: 600}, {}) as claim:
        claim.keep()
    assert ledger.used_mb(0) == 600


def test_used_is_the_larger_of_estimate_and_measurement() -> None:
    ledger = Ledger({0: 1000})
    claim = ledger.reserve("a", {0: 600}, {})
    claim.measure({0: 300}, {0: 300})
    assert ledger.used_mb(0) == 600
    claim.measure({0: 700}, {0: 700})
    assert ledger.used_mb(0) == 700


def test_mapped_weights_are_taken_off_what_the_kernel_calls_available() -> None:
    ledger = Ledger({0: 16_000})
    claim = ledger.reserve("a", {0: 5000}, {0: 8000})
    claim.measure({0: 5000}, {0: 500})  # 4,500 MB of it are a mapped file
    assert ledger.free_mb(0, 7500) == 3000


def test_a_load_under_way_is_taken_off_although_the_device_cannot_see_it_yet() -> None:
    ledger = Ledger({0: 16_000})
    ledger.reserve("a", {0: 5000}, {0: 8000})
    assert ledger.free_mb(0, 8000) == 3000
    with pytest.raises(DoesNotFit) as refused:
        ledger.reserve("b", {0: 3001}, {0: 8000})
    assert refused.value.free_mb == {0: 3000}


def test_what_others_took_of_a_device_is_not_free() -> None:
    assert Ledger({0: 16_000}).free_mb(0, 100) == 100


def test_a_device_of_which_nothing_is_known_has_no_free_memory_to_tell() -> None:
    ledger = Ledger({})
    assert ledger.free_mb(3, None) is None
    assert ledger.free_mb(3, 10) == 10
    with pytest.raises(DoesNotFit):
        ledger.reserve("a", {3: 1}, {})


def test_each_device_must_have_its_share() -> None:
    ledger = Ledger({0: 1000, 1: 100})
    with pytest.raises(DoesNotFit):
        ledger.reserve("a", {0: 100, 1: 101}, {})
    assert ledger.used_mb(0) == 0


def test_a_model_can_be_left_out_of_account() -> None:
    ledger = Ledger({0: 1000})
    claim = ledger.reserve("a", {0: 600}, {0: 900})
    claim.measure({0: 600}, {0: 600})
    assert ledger.free_mb(0, 300) == 300
    assert ledger.free_mb(0, 300, without=claim) == 900


def test_a_claim_that_yields_is_free_to_a_load_and_not_to_another_that_yields() -> None:
    ledger = Ledger({0: 1000})
    claim = ledger.reserve("counts", {0: 300}, {0: 500}, yields=True)
    claim.measure({0: 300}, {0: 300})
    assert (ledger.used_mb(0), ledger.free_mb(0, 200)) == (0, 500)
    with pytest.raises(DoesNotFit):
        ledger.reserve("counts too", {0: 201}, {0: 200}, yields=True)
    ledger.reserve("counts too", {0: 200}, {0: 200}, yields=True)
    ledger.reserve("model", {0: 500}, {0: 200})


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_free_is_never_negative_nor_more_than_either_view(limit: int, says: int, need: int, measured: int) -> None:
    ledger = Ledger({0: limit})
    claim = Claim(ledger, "a", {0: need})
    ledger.claims.add(claim)
    claim.measure({0: measured}, {0: measured // 2})
    free = ledger.free_mb(0, says)
    assert free is not None
    assert 0 <= free <= max(0, min(limit - max(need, measured), says))


class Node(RuleBasedStateMachine):
    """Loads and unloads in any order on a real device: each process takes its memory bit by bit, part of it mapped."""

    TOTAL = 1000

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger({0: self.TOTAL})
        self.loads: list[tuple[Claim, int]] = []
        self.taken: dict[Claim, int] = {}
        self.mapped: dict[Claim, int] = {}

    def says(self) -> int:
        return self.TOTAL - sum(self.taken.values())

    @rule(need=st.integers(1, 700), mapped=st.integers(0, 100))
    def begin(self, need: int, mapped: int) -> None:
        try:
            claim = self.ledger.reserve("m", {0: need}, {0: self.says()})
        except DoesNotFit:
            return
        self.taken[claim] = 0
        self.mapped[claim] = need * mapped // 100
        self.loads.append((claim, need))

    @rule(data=st.data())
    def take_a_bit(self, data: Any) -> None:
        if self.loads:
            claim, need = data.draw(st.sampled_from(self.loads))
            own = need - self.mapped[claim]
            self.taken[claim] = min(own, self.taken[claim] + max(1, own // 3))

    @rule(data=st.data())
    def measure(self, data: Any) -> None:
        if self.loads:
            claim, _ = data.draw(st.sampled_from(self.loads))
            claim.measure({0: self.taken[claim] + self.mapped[claim]}, {0: self.taken[claim]})

    @rule(data=st.data())
    def end(self, data: Any) -> None:
        if self.loads:
            load = data.draw(st.sampled_from(self.loads))
            self.loads.remove(load)
            del self.taken[load[0]], self.mapped[load[0]]
            load[0].release()

    @invariant()
    def all_loads_together_never_exceed_the_device(self) -> None:
        assert sum(need for _, need in self.loads) <= self.TOTAL

    @invariant()
    def what_is_free_could_really_be_taken(self) -> None:
        free = self.ledger.free_mb(0, self.says())
        assert free is not None
        assert free + sum(need for _, need in self.loads) <= self.TOTAL


TestNode = Node.TestCase


def test_what_a_host_holds_that_does_not_end_stays_taken_until_it_does() -> None:
    ledger = Ledger({0: 1000})
    with ledger.reserve("a", {0: 600}, {0: 1000}) as claim:
        claim.keep()
    claim.strand()
    claim.release()
    assert ledger.used_mb(0) == 600
    claim.washed_up()
    assert ledger.used_mb(0) == 0
