"""The list of what the loader decided: its bound, and what repeats."""

from __future__ import annotations

import msgspec
import pytest

from helexa.cortex.decisions import NODES_SHOWN, REPEATS_WITHIN_S, UPKEEP, Decisions, Evidence, Whom
from helexa.cortex.plans import Bar, Need, Plan, Reason


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def decisions(kept: int = 200) -> tuple[Decisions, Clock]:
    clock = Clock(1_764_000_000.0)
    return Decisions(clock, kept), clock


def plan(node: str = "beast", victims: tuple[str, ...] = ("old",), price: float = 0.25) -> Plan:
    order = (False, False, (0, price), 10, node)
    return Plan("m", node, (0,), (8000,), Need((8000,), "measured"), victims, price, 10, order, seconds=4.0)


def test_a_decision_says_what_when_for_whom_why_what_else_was_weighed_and_at_what_price() -> None:
    made, _ = decisions()
    weighed = [plan(), plan("benjy", ("a", "b"), 0.5), Reason("tiny", Bar.NEVER, "is too small")]
    made.note(
        "evict",
        "it costs least",
        Whom("request", ("req-1",), 3),
        model="old",
        node="beast",
        wanted="m",
        evidence=Evidence("it costs least", weighed[0], weighed, 3),  # type: ignore[arg-type]
    )
    assert msgspec.to_builtins(made.last()) == [
        {
            "seq": 1,
            "at": "2025-11-24T16:00:00.000Z",
            "what": "evict",
            "model": "old",
            "node": "beast",
            "wanted": "m",
            "by": "request",
            "requests": ("req-1",),
            "waiting": 3,
            "why": "it costs least",
            "price": 0.25,
            "seconds": 4.0,
            "weighed": [
                {"node": "beast", "price": 0.25, "victims": ("old",), "seconds": 4.0},
                {"node": "benjy", "price": 0.5, "victims": ("a", "b"), "seconds": 4.0},
                {"node": "tiny", "reason": "is too small"},
            ],
        }
    ]


def test_the_latest_come_first_and_the_oldest_are_forgotten() -> None:
    made, _ = decisions(kept=3)
    for number in range(5):
        made.note("load", str(number), UPKEEP, model="m")
    assert [d.why for d in made.last()] == ["4", "3", "2"]
    assert [d.seq for d in made.last(2)] == [5, 4]


@pytest.mark.parametrize("what", ["refuse", "timed_out", "wait", "stays", "load_failed"])
def test_what_repeats_is_counted_and_pushes_nothing_out(what: str) -> None:
    made, clock = decisions(kept=3)
    made.note("load", "first", UPKEEP, model="other")
    for number in range(1000):
        clock.now += 0.01
        made.note(what, f"words {number}", Whom("request", (f"r{number}",), 1), model="m")  # type: ignore[arg-type]
    latest, first = made.last()
    assert (latest.times, latest.why, latest.requests[-1], len(latest.requests)) == (1000, "words 999", "r999", 8)
    assert latest.last_at is not None
    assert latest.last_at > latest.at
    assert first.why == "first"


def test_the_same_after_a_while_or_about_another_model_is_a_line_of_its_own() -> None:
    made, clock = decisions()
    made.note("refuse", "full", UPKEEP, model="m")
    made.note("refuse", "full", UPKEEP, model="n")
    clock.now += REPEATS_WITHIN_S
    made.note("refuse", "full", UPKEEP, model="m")
    assert [(d.model, d.times) for d in made.last()] == [("m", 1), ("n", 1), ("m", 1)]


def test_loads_and_evictions_are_never_counted_together() -> None:
    made, _ = decisions()
    for _ in range(2):
        made.note("load", "room", UPKEEP, model="m", node="a")
    assert len(made.last()) == 2


def test_a_repeat_of_what_was_forgotten_is_noted_anew() -> None:
    made, _ = decisions(kept=2)
    made.note("refuse", "full", UPKEEP, model="m")
    for _ in range(2):
        made.note("load", "room", UPKEEP, model="n")
    made.note("refuse", "full", UPKEEP, model="m")
    assert [d.what for d in made.last()] == ["refuse", "load"]


def test_of_a_large_fleet_some_nodes_are_shown_and_the_others_counted() -> None:
    made, _ = decisions()
    made.note("wait", "no room", UPKEEP, model="m", against=[Reason(f"n{i}", Bar.NOT_NOW, "full") for i in range(1000)])
    [only] = made.last()
    assert (len(only.weighed), only.not_shown) == (NODES_SHOWN, 1000 - NODES_SHOWN)
