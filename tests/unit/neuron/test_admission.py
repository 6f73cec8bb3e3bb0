from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.aio import run
from tests.helpers.nests import exchange
from tests.helpers.scripted import ScriptedSession

from helexa.core.errors import ModelUnloading, Overloaded
from helexa.core.relay.upstream import Upstream
from helexa.neuron.admission import Seat, Seats


def seats_of(slots: int, queue: int = 256) -> Seats:
    return Seats("m", slots, ScriptedSession(), Upstream("m", "unix:/nowhere"), lambda: 0.0, queue=queue)


def wait_for(seats: Seats, client: str) -> asyncio.Task[Seat]:
    waiting = seats.enter(exchange("m", client))
    assert not isinstance(waiting, Seat)
    return asyncio.ensure_future(waiting)


def take(seats: Seats, client: str = "x") -> Seat:
    seat = seats.enter(exchange("m", client))
    assert isinstance(seat, Seat)
    return seat


def refused() -> ModelUnloading:
    return ModelUnloading("m goes")


def test_a_free_slot_is_had_at_once_and_given_back_once() -> None:
    seats = seats_of(2)
    seat = take(seats)
    assert (seats.active, seats.last_used) == (1, 1.0)
    seat.release()
    seat.release()
    assert seats.active == 0
    assert seats.last_used > 1.0


def test_who_comes_when_all_slots_are_taken_waits_for_the_next() -> None:
    async def main() -> None:
        seats = seats_of(1)
        seat = take(seats)
        waiting = wait_for(seats, "a")
        await asyncio.sleep(0)
        assert (seats.active, seats.queued) == (1, 1)
        seat.release()
        assert (seats.active, seats.queued) == (1, 0)
        (await waiting).release()
        assert seats.active == 0

    run(main())


def test_clients_take_turns() -> None:
    async def main() -> None:
        seats = seats_of(1)
        order: list[str] = []
        seat: Seat | None = take(seats)
        waiting = {name: wait_for(seats, name[0]) for name in ("a1", "a2", "a3", "b1", "c1", "b2")}
        await asyncio.sleep(0)
        for _ in range(6):
            assert seat is not None
            seat.release()
            await asyncio.sleep(0)
            ((name, task),) = [(n, t) for n, t in waiting.items() if t.done()]
            order.append(name)
            seat = (waiting.pop(name), task.result())[1]
        assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]

    run(main())


def test_the_gateways_word_for_its_client_is_taken() -> None:
    async def main() -> None:
        seats = seats_of(1)
        seat = take(seats)
        heads = [b"POST / HTTP/1.1\r\nx-helexa-client: %s\r\n\r\n" % who for who in (b"k1", b"k1", b"k2")]
        waiting = []
        for head in heads:
            entered = seats.enter(exchange("m", "gateway", head))
            assert not isinstance(entered, Seat)
            waiting.append(asyncio.ensure_future(entered))
        await asyncio.sleep(0)
        seat.release()
        (await waiting[0]).release()
        await asyncio.sleep(0)
        assert waiting[2].done()
        (await waiting[2]).release()
        (await waiting[1]).release()

    run(main())


def test_a_full_queue_refuses() -> None:
    async def main() -> None:
        seats = seats_of(1, queue=1)
        seat = take(seats)
        waiting = wait_for(seats, "a")
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="all 1 slots"):
            seats.enter(exchange("m"))
        seat.release()
        (await waiting).release()

    run(main())


def test_one_client_does_not_fill_the_queue_and_who_is_refused_is_told_when_it_will_be_empty() -> None:
    async def main() -> None:
        seats = seats_of(1, queue=9)
        seat = take(seats)
        for _ in range(3):  # at a pace
            again = wait_for(seats, "x")
            await asyncio.sleep(0.01)
            seat.release()
            seat = await again
        waiting = []
        for _ in range(6):
            waiting.append(wait_for(seats, "a"))
            await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="6 of 6 waiting requests are of a") as caught:
            seats.enter(exchange("m", "a"))
        assert caught.value.retry_after_s == 1  # six, at some hundred a second
        waiting.append(wait_for(seats, "b"))
        await asyncio.sleep(0)
        assert seats.queued == 7
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        seat.release()

    run(main())


def test_closing_refuses_who_waits_and_who_comes_and_lets_run_what_runs() -> None:
    async def main() -> None:
        seats = seats_of(1)
        seat = take(seats)
        waiting = wait_for(seats, "a")
        unstarted = wait_for(seats, "b")
        await asyncio.sleep(0)
        late = seats.enter(exchange("m", "c"))
        assert not isinstance(late, Seat)
        seats.close(refused)
        for refusal in (waiting, unstarted, asyncio.ensure_future(late)):
            with pytest.raises(ModelUnloading):
                await refusal
        with pytest.raises(ModelUnloading):
            seats.enter(exchange("m"))
        assert seats.active == 1
        idle = asyncio.create_task(seats.idle())
        await asyncio.sleep(0)
        assert not idle.done()
        seat.release()
        await idle
        seats.reopen()
        take(seats).release()

    run(main())


def test_a_seat_granted_to_who_has_just_left_goes_to_the_next() -> None:
    async def main() -> None:
        seats = seats_of(1)
        seat = take(seats)
        leaver, next_one = wait_for(seats, "a"), wait_for(seats, "b")
        await asyncio.sleep(0)
        seat.release()
        leaver.cancel()  # in the same turn of the loop as the grant
        (await next_one).release()
        assert leaver.cancelled()
        assert (seats.active, seats.queued) == (0, 0)

    run(main())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.sampled_from(["come", "release", "cancel", "turn", "close", "reopen"]), st.integers(0, 9)),
        max_size=60,
    ),
)
def test_whatever_happens_no_seat_is_lost_and_none_given_twice(slots: int, steps: list[tuple[str, int]]) -> None:
    async def main() -> None:
        seats = seats_of(slots, queue=5)
        held: list[Seat] = []
        waiting: list[asyncio.Task[Seat]] = []

        def collect() -> None:
            for task in [t for t in waiting if t.done()]:
                waiting.remove(task)
                if not task.cancelled() and task.exception() is None:
                    held.append(task.result())

        for what, which in steps:
            collect()
            if what == "come":
                come(seats, held, waiting, f"c{which % 3}")
            elif what == "release" and held:
                held.pop(which % len(held)).release()
            elif what == "cancel" and waiting:
                waiting[which % len(waiting)].cancel()
            elif what == "turn":
                await asyncio.sleep(0)
            elif what == "close":
                seats.close(refused)
            elif what == "reopen":
                seats.reopen()
            assert len(held) <= seats.active <= slots
            assert 0 <= seats.queued <= len(waiting)
        seats.reopen()
        while held or waiting:
            for seat in held:
                seat.release()
            held.clear()
            await asyncio.sleep(0)
            collect()
        assert (seats.active, seats.queued) == (0, 0)
        held.extend(take(seats) for _ in range(slots))
        assert seats.active == slots

    def come(seats: Seats, held: list[Seat], waiting: list[asyncio.Task[Seat]], client: str) -> None:
        try:
            entered: Any = seats.enter(exchange("m", client))
        except (Overloaded, ModelUnloading):
            return
        if isinstance(entered, Seat):
            held.append(entered)
        else:
            waiting.append(asyncio.ensure_future(entered))

    run(main())
