from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.fleets import fleet, info

from helexa.cortex.fleet import Replica
from helexa.cortex.router import choose

# (inflight, state) of the replica on node n0, n1, ...
REPLICAS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["up", "suspect"])), max_size=8)


def replicas(described: list[tuple[int, str]]) -> list[Replica]:
    view = fleet(*(f"n{i}" for i in range(len(described))))
    made = []
    for i, (inflight, state) in enumerate(described):
        node = view.nodes[f"n{i}"]
        node.state = state  # type: ignore[assignment]
        replica = Replica(node, "m", info("m"))
        replica.inflight = inflight
        made.append(replica)
    return made


@given(described=REPLICAS, tried=st.sets(st.sampled_from([f"n{i}" for i in range(8)])), seed=st.integers())
def test_the_choice_is_an_untried_replica_with_the_fewest_in_flight_on_a_node_that_is_up_if_one_is(
    described: list[tuple[int, str]], tried: set[str], seed: int
) -> None:
    live = replicas(described)
    able = [r for r in live if r.node.name not in tried]
    up = [r for r in able if r.node.state == "up"]
    chosen = choose(live, tried, Random(seed))
    if not able:
        assert chosen is None
    else:
        best = up or able
        assert chosen in best
        assert chosen.inflight == min(r.inflight for r in best)


@given(described=REPLICAS, seed=st.integers())
def test_the_same_list_and_seed_give_the_same_choice_and_change_nothing(
    described: list[tuple[int, str]], seed: int
) -> None:
    live = replicas(described)
    before = [(r.inflight, r.node.state) for r in live]
    assert choose(live, (), Random(seed)) is choose(live, (), Random(seed))
    assert [(r.inflight, r.node.state) for r in live] == before


def test_ties_are_broken_evenly() -> None:
    live = replicas([(1, "up"), (0, "up"), (0, "up"), (0, "up"), (0, "suspect")])
    rng = Random(7)
    counts = Counter(r.node.name for _ in range(3000) if (r := choose(live, (), rng)) is not None)
    assert set(counts) == {"n1", "n2", "n3"}
    assert min(counts.values()) > 900


def test_requests_spread_over_equal_replicas_so_that_none_is_ever_two_ahead() -> None:
    live = replicas([(0, "up")] * 5)
    rng = Random(1)
    for _ in range(200):
        chosen = choose(live, (), rng)
        assert chosen is not None
        chosen.begin(0.0)
        assert max(r.inflight for r in live) - min(r.inflight for r in live) <= 1
