from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.core.fair_queue import FairQueue, has_share, retry_after_s

CLIENTS = "abc"


@given(st.integers(1, 300), st.integers(0, 5))
def test_a_client_without_a_place_has_one_until_the_queue_is_full(room: int, others: int) -> None:
    assert all(has_share(room, waiting, 0) for waiting in range(room))
    assert not has_share(room, room + others, 0)


@given(st.integers(3, 300))
def test_whoever_comes_as_often_as_it_likes_leaves_places_for_others(room: int) -> None:
    held = dict.fromkeys(CLIENTS, 0)
    for client in CLIENTS:
        while has_share(room, sum(held.values()), held[client]):
            held[client] += 1
    first, second, _ = held.values()
    assert room // 2 <= first <= room - room // 4 or room < 8
    assert held["a"] < room
    assert second > 0
    assert sum(held.values()) <= room


@given(st.lists(st.tuples(st.sampled_from(CLIENTS), st.sampled_from(["add", "pop", "remove"])), max_size=60))
def test_it_holds_what_was_added_and_not_taken_each_clients_own_in_order(steps: list[tuple[str, str]]) -> None:
    queue: FairQueue[int] = FairQueue()
    model: dict[str, list[int]] = {client: [] for client in CLIENTS}
    for number, (client, step) in enumerate(steps):
        if step == "add":
            queue.add(client, number)
            model[client].append(number)
        elif step == "remove":
            queue.remove(client, model[client].pop(len(model[client]) // 2) if model[client] else -1)
        elif len(queue):
            first = queue.first()
            taken = queue.pop()
            assert taken == first
            [owner] = [c for c, line in model.items() if taken in line]
            assert model[owner].pop(0) == taken
        assert len(queue) == sum(map(len, model.values()))
        assert all(queue.own(c) == len(line) for c, line in model.items())
    assert queue.first() is None or queue.first() in {line[0] for line in model.values() if line}


@given(st.lists(st.sampled_from(CLIENTS), min_size=1, max_size=40))
def test_nobody_is_served_twice_while_another_waits(order: list[str]) -> None:
    queue: FairQueue[str] = FairQueue()
    for client in order:
        queue.add(client, client)
    served: list[str] = []
    while queue:
        waiting = {client for client in CLIENTS if queue.own(client)}
        served.append(queue.pop())
        recent = served[-len(waiting) :]
        if len(served) >= len(waiting):
            assert len(set(recent)) == len(recent) or len(waiting) == 1


@pytest.mark.parametrize(
    ("waiting", "per_s", "told"), [(10, 2.0, 5), (1, 100.0, 1), (500, 1.0, 60), (3, None, 5), (3, 0.0, 5)]
)
def test_who_is_refused_is_told_when_those_ahead_will_be_done(waiting: int, per_s: float | None, told: int) -> None:
    assert retry_after_s(waiting, per_s) == told
