from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.cortex.prefixes import Prompt
from helexa.cortex.work import Ticket, Work

RATE = 100.0


@dataclass
class Asked:
    t_first_token: float = 0.0


def at_rate(rate: float = RATE) -> Work:
    work = Work()
    work.timed({"prompt_n": 1000, "prompt_ms": 1000 * 1000 / rate})
    return work


def send(work: Work, tokens: float, now: float, *, is_told: bool = True, cached: float = 0.0) -> Ticket:
    prompt = Prompt([], [], 0.0)
    ticket = Ticket(work, Asked(), prompt, tokens, cached=cached, is_told=is_told, is_hint=False, now=now)
    work.add(ticket)
    return ticket


def first_token(ticket: Ticket, now: float) -> None:
    assert isinstance(ticket.asked, Asked)
    ticket.asked.t_first_token = now


def test_prompts_ahead_take_what_is_left_of_the_first_and_all_of_the_others() -> None:
    work = at_rate()
    send(work, 400, now=10.0)
    send(work, 100, now=11.0)
    assert work.ahead_s(10.0, RATE) == pytest.approx(5.0)
    assert work.ahead_s(12.0, RATE) == pytest.approx(3.0)


def test_a_first_token_ends_a_prompt_and_the_next_one_began_then() -> None:
    work = at_rate()
    slow = send(work, 400, now=10.0)
    send(work, 100, now=10.0)
    first_token(slow, 20.0)
    assert work.ahead_s(20.5, RATE) == pytest.approx(0.5)


def test_a_prompt_that_takes_longer_than_it_should_holds_back_the_others_all_the_same() -> None:
    work = at_rate()
    send(work, 100, now=0.0)
    send(work, 300, now=0.0)
    assert work.ahead_s(60.0, RATE) == pytest.approx(3.0)


def test_a_request_that_will_not_show_its_first_token_is_taken_to_be_computed_in_its_time() -> None:
    work = at_rate()
    send(work, 100, now=0.0, is_told=False)
    send(work, 300, now=0.0, is_told=False)
    assert work.ahead_s(2.0, RATE) == pytest.approx(2.0)
    assert work.ahead_s(9.0, RATE) == 0.0


def test_a_request_that_ended_early_holds_nobody_back() -> None:
    work = at_rate()
    gone = send(work, 400, now=0.0)
    send(work, 100, now=0.0)
    work.ended(gone, 1.0, is_answered=False)
    assert work.ahead_s(1.0, RATE) == pytest.approx(0.0)


@given(
    sizes=st.lists(st.floats(1, 1e5), max_size=8),
    times=st.lists(st.floats(0, 1e4), min_size=8, max_size=8),
    now=st.floats(0, 2e4),
)
def test_what_is_ahead_is_never_negative_and_never_more_than_all_of_it(
    sizes: list[float], times: list[float], now: float
) -> None:
    work = at_rate()
    tickets = [send(work, size, now=0.0) for size in sizes]
    for ticket, done_at in zip(tickets[::2], times, strict=False):
        first_token(ticket, min(done_at, now))
    assert 0.0 <= work.ahead_s(now, RATE) <= sum(sizes) / RATE * (1 + 1e-9)
    for ticket in tickets:
        work.ended(ticket, now, is_answered=False)
    assert work.ahead_s(now, RATE) == 0.0


def test_where_all_slots_are_taken_one_has_to_become_free() -> None:
    work = at_rate()
    work.of_size(slots=4, context=1000)
    assert [work.slot_s(n) for n in (3, 4, 5)] == [0.0, pytest.approx(5.0 / 4), pytest.approx(10.0 / 4)]


def test_how_long_a_slot_is_taken_is_learnt_from_requests_that_were_answered() -> None:
    work = at_rate()
    for _ in range(100):
        work.ended(send(work, 10, now=0.0, is_told=False), 20.0, is_answered=True)
        work.ended(send(work, 10, now=0.0), 0.1, is_answered=False)
    assert work.request_s == pytest.approx(20.0, rel=0.01)


def test_a_replica_of_unknown_slots_is_never_full() -> None:
    assert Work().slot_s(1000) == 0.0


def test_the_rate_is_the_engines_own_and_long_prompts_weigh_more() -> None:
    work = Work()
    assert work.rate is None
    work.timed({"prompt_n": 9000, "prompt_ms": 9000.0})
    work.timed({"prompt_n": 100, "prompt_ms": 1000.0})
    assert work.rate == pytest.approx((0.9 * 9000 + 100) / (0.9 * 9 + 1))


@pytest.mark.parametrize(
    "timings", [{}, {"prompt_n": 3, "prompt_ms": 9.0}, {"prompt_n": 500, "prompt_ms": 0}, {"prompt_n": "x"}]
)
def test_timings_that_say_nothing_of_the_rate_leave_it(timings: dict[str, object]) -> None:
    work = Work()
    work.timed(timings)
    assert work.rate is None


def test_an_engine_that_keeps_nothing_is_trusted_less_and_never_not_at_all() -> None:
    work = Work()
    for _ in range(100):
        work.cached(send(work, 10, now=0.0, cached=500.0), 0)
    assert 0.0 < work.trust < 0.3
    for _ in range(100):
        work.cached(send(work, 10, now=0.0, cached=500.0), 700)
    assert work.trust == pytest.approx(1.0, abs=0.01)


def test_a_request_that_ended_is_let_go() -> None:
    work = at_rate()
    for _ in range(5):
        ticket = send(work, 10, now=0.0)
        first_token(ticket, 0.1)
        work.ended(ticket, 0.2, is_answered=True)
    assert not work.pending


def test_another_process_begins_without_work_and_is_as_fast() -> None:
    work = at_rate()
    send(work, 400, now=0.0)
    work.reset()
    assert (work.ahead_s(0.0, RATE), work.rate) == (0.0, pytest.approx(RATE))
