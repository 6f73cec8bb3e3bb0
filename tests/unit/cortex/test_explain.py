from __future__ import annotations

import pytest

from helexa.cortex.explain import why_here
from helexa.cortex.plans import Bar, Need, Plan, Reason


def plan(node: str, *victims: str, price: float = 0.0, left: int = 100, last: bool = False, rank: int = 0) -> Plan:
    order = (last, False, (rank if victims else -(2**31), price), left, node)
    return Plan("m", node, (0,), (8000,), Need((8000,), "measured"), victims, price, left, order, drains=victims[1:])


NO = Reason("tiny", Bar.NEVER, "is too small")
ROOM = "m needs 8,000 MB (measured), and a has room for it as it is"
COSTS = "m needs 8,000 MB (measured); on a x would have to go for it, at a price of 0.25"


@pytest.mark.parametrize(
    ("weighed", "said"),
    [
        ([plan("a")], ROOM),
        ([plan("a"), NO], f"{ROOM}; no other node can hold it now"),
        ([plan("a", "x", price=0.25), NO], f"{COSTS}; no other node can hold it now"),
        ([plan("a"), plan("b", "x", price=0.25)], f"{ROOM}; on b, the next best, x would have to go"),
        ([plan("a"), plan("b", left=900)], f"{ROOM}; b would leave more room unused (900 MB against 100)"),
        ([plan("a"), plan("b")], f"{ROOM}; b is as good, and comes later by name"),
        ([plan("a"), plan("b", last=True)], f"{ROOM}; b could hold it, and is suspect"),
        ([plan("a", "x", price=0.25), plan("b", "y", price=0.5)], f"{COSTS}; b, the next best, would cost 0.5"),
        (
            [plan("a", "x", price=0.25), plan("b", "y", price=0.1, rank=5)],
            f"{COSTS}; b, the next best, would displace a higher residency_priority",
        ),
        (
            [plan("a", "x", "y", "z", price=0.25)],
            (
                "m needs 8,000 MB (measured); on a x, y and z would have to go for it, at a price of 0.25 "
                "(y and z are in use, and may finish first)"
            ),
        ),
    ],
)
def test_the_reason_for_a_plan_is_the_first_thing_by_which_the_next_best_is_worse(
    weighed: list[Plan | Reason], said: str
) -> None:
    assert isinstance(weighed[0], Plan)
    assert why_here(weighed[0], weighed) == said
