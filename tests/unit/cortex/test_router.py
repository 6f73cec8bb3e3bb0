from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.fleets import fleet, info

from helexa.cortex.nodes import Replica
from helexa.cortex.prefixes import Prompt
from helexa.cortex.router import WEIGHT_OF_TOKEN, Choice, ModelRouter, choose
from helexa.cortex.work import Ticket

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


# by the expected time to the first token


@dataclass
class Asked:
    t_first_token: float = 0.0


def asked(*path: int, each: int = 1000, session: str | None = None) -> Prompt:
    """A prompt by the numbers of its messages, of so many tokens each."""
    hashes = [hash(path[: at + 1]) for at in range(len(path))]
    ends = [WEIGHT_OF_TOKEN * each * (at + 1) for at in range(len(path))]
    return Prompt(hashes, ends, ends[-1], session)


def send(model: ModelRouter, choice: Choice, now: float = 0.0) -> Ticket:
    choice.replica.begin(now)
    return model.sent(choice, Asked(), now, is_told=True)


def finish(model: ModelRouter, ticket: Ticket, replica: Replica, now: float) -> None:
    assert isinstance(ticket.asked, Asked)
    ticket.asked.t_first_token = now
    replica.end(now)
    model.ended(ticket, now)


def picked(
    model: ModelRouter, live: list[Replica], prompt: Prompt, seed: int = 1, tried: Collection[str] = ()
) -> Choice:
    choice = model.choose(live, tried, prompt, 0.0, Random(seed))
    assert choice is not None
    return choice


def served(model: ModelRouter, live: list[Replica], prompt: Prompt) -> Replica:
    """Asked while nothing else is, and answered."""
    choice = picked(model, live, prompt)
    ticket = send(model, choice)
    finish(model, ticket, choice.replica, 0.0)
    return choice.replica


def test_a_conversation_goes_where_its_beginning_is_cached() -> None:
    model, live = ModelRouter(), replicas([(0, "up")] * 3)
    first = served(model, live, asked(1, 1))
    for seed in range(20):
        choice = picked(model, live, asked(1, 1, 1), seed)
        assert (choice.replica, choice.by, choice.held) == (first, "prefix", 8000.0)


def test_it_moves_where_it_would_wait_longer_than_the_prompt_takes_elsewhere() -> None:
    model, live = ModelRouter(), replicas([(0, "up")] * 2)
    first = served(model, live, asked(1, 1))
    for number in range(2, 6):  # new prompts, of 2 s each, and no first token of any
        send(model, Choice(first, asked(number, number), 0.0, "new"))
    choice = picked(model, live, asked(1, 1, 1))
    assert choice.replica is not first
    assert choice.by == "moved"


def test_new_conversations_go_to_whoever_has_least_before_it() -> None:
    model, live = ModelRouter(), replicas([(0, "up")] * 3)
    chosen = []
    for number in range(9):
        choice = picked(model, live, asked(number, number), number)
        send(model, choice)
        chosen.append(choice.replica.node.name)
    assert Counter(chosen) == {"n0": 3, "n1": 3, "n2": 3}


def test_of_equal_times_the_fewest_in_flight_decide() -> None:
    model, live = ModelRouter(), replicas([(3, "up"), (1, "up"), (2, "up")])
    choice = picked(model, live, asked(1))
    assert choice.replica is live[1]


def test_a_faster_node_is_worth_a_longer_queue() -> None:
    model, live = ModelRouter(), replicas([(0, "up"), (2, "up")])
    live[0].work.timed({"prompt_n": 1000, "prompt_ms": 10_000})
    live[1].work.timed({"prompt_n": 1000, "prompt_ms": 100})
    choice = picked(model, live, asked(1, 1))
    assert choice.replica is live[1]


def test_a_replica_that_has_shown_nothing_yet_is_taken_to_be_as_fast_as_the_best() -> None:
    model, live = ModelRouter(), replicas([(1, "up"), (0, "up"), (1, "up")])
    live[0].work.timed({"prompt_n": 9000, "prompt_ms": 100})
    live[2].work.timed({"prompt_n": 1000, "prompt_ms": 1000})
    assert picked(model, live, asked(1)).replica is live[1]
    assert {w.node: w.prefill_rate for w in model.weigh(live, (), asked(1), 0.0)} == {
        "n0": 90_000,
        "n1": 90_000,
        "n2": 1000,
    }


def test_a_replica_with_a_free_slot_comes_before_one_that_has_the_prefix_and_none() -> None:
    model, live = ModelRouter(), replicas([(0, "up")] * 2)
    for replica in live:
        replica.work.of_size(slots=2, context=32_768)
    first = served(model, live, asked(1))
    first.inflight = 2
    choice = picked(model, live, asked(1, 1))
    assert choice.replica is not first


def test_a_suspect_node_is_asked_last_whatever_it_has_cached() -> None:
    model, live = ModelRouter(), replicas([(0, "up")] * 2)
    first = served(model, live, asked(1, 1))
    other = next(r for r in live if r is not first)
    first.node.state = "suspect"
    choice = picked(model, live, asked(1, 1, 1))
    assert choice.replica is other
    choice = picked(model, live, asked(1, 1, 1), tried=[other.node.name])
    assert choice.replica is first
    assert model.choose(live, [r.node.name for r in live], asked(1), 0.0, Random(1)) is None


def test_where_the_hashes_say_nothing_the_session_does() -> None:
    model, live = ModelRouter(), replicas([(0, "up")] * 3)
    first = served(model, live, asked(1, 1, session="talk"))
    for seed in range(20):
        choice = picked(model, live, asked(2, 2, session="talk"), seed)
        assert (choice.replica, choice.by) == (first, "session")


def test_what_only_a_session_says_is_no_reason_to_send_its_next_prompt_after_it() -> None:
    model, live = ModelRouter(), replicas([(0, "up")] * 2)
    first = served(model, live, asked(1, 1, session="talk"))
    send(model, picked(model, live, asked(2, 2, session="talk")))
    choice = picked(model, live, asked(3, 3, session="talk"))
    assert choice.replica is not first


def test_a_replica_that_left_the_live_list_is_forgotten() -> None:
    model, live = ModelRouter(), replicas([(0, "up")] * 2)
    first = served(model, live, asked(1, 1))
    model.keep_only([r for r in live if r is not first])
    choice = picked(model, live, asked(1, 1, 1))
    assert choice.by == "new"


def test_a_tokens_weight_is_learnt_from_what_the_engine_counts() -> None:
    model, live = ModelRouter(), replicas([(0, "up")] * 2)
    for number in range(200):
        choice = picked(model, live, asked(number))
        model.ended(send(model, choice), 0.0, prompt_tokens=1600)
    assert model.weight_of_token == pytest.approx(WEIGHT_OF_TOKEN * 1000 / 1600)


@given(
    described=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["up", "suspect"])), max_size=40),
    seed=st.integers(),
)
def test_one_of_many_is_found_wherever_one_can_be_asked(described: list[tuple[int, str]], seed: int) -> None:
    live, rng = replicas(described), Random(seed)
    tried = {r.node.name for r in live if rng.random() < 0.7}
    model = ModelRouter()
    choice = model.choose(live, tried, asked(1, 1), 0.0, rng)
    able = [r for r in live if r.node.name not in tried]
    assert (choice is None) == (not able)
    if choice is not None:
        assert choice.replica in able
        if len(live) <= 8:
            best = [r for r in able if r.node.state == "up"] or able
            assert choice.replica.inflight == min(r.inflight for r in best)


def test_of_very_many_the_one_that_holds_the_prompt_is_among_those_looked_at() -> None:
    model, live = ModelRouter(), replicas([(0, "up")] * 100)
    for number in range(10):  # all of them begin alike
        served(model, live, asked(0, number))
    first = served(model, live, asked(0, 77, 77))
    for seed in range(20):
        choice = picked(model, live, asked(0, 77, 77, 77), seed)
        assert choice.replica is first


def test_the_reason_names_every_replica_and_the_parts_of_its_time() -> None:
    model, live = ModelRouter(), replicas([(0, "up"), (0, "up"), (0, "suspect")])
    first = served(model, live, asked(1, 1))
    send(model, Choice(first, asked(5), 0.0, "new"))
    first.work.of_size(slots=1, context=4096)
    weighed = model.weigh(live, ["n2"], asked(1, 1, 1), 0.0)
    by_name = {w.node: w for w in weighed}
    its = by_name[first.node.name]
    assert (its.tokens, its.cached, its.ahead_s, its.prefill_s) == (3000, 2000, 1.0, 1.0)
    assert its.expected_s == its.ahead_s + its.prefill_s + its.slot_s > 2.0
    assert weighed[-1].is_tried
    text = "; ".join(map(str, weighed))
    assert "1000 of 3000 tokens at 1000/s" in text
    assert "suspect, tried" in text
