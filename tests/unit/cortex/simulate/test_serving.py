from __future__ import annotations

from random import Random

import pytest
from bench.fleet.routing import RULES, serve

from helexa.cortex.simulate.conversations import AGENTS, mix
from helexa.cortex.simulate.serving import Conversation, Engine, LeastLoad, Ours, Served, Serving, Turn

ENGINE = Engine(prefill=1000.0, decode=10.0, slots=2)


def play(*talks: Conversation, replicas: int = 1) -> Served:
    return Serving(talks, LeastLoad(1), ENGINE, replicas=replicas, seconds=1000.0).run()


def talk(start: float, *turns: Turn, kind: int = 1) -> Conversation:
    return Conversation(start, (kind, 1000), turns)


def test_a_turn_computes_what_its_replica_has_not_seen() -> None:
    found = play(talk(0.0, Turn(0.0, 500, 20), Turn(1.0, 300, 20)))
    assert (found.requests, found.prompt_tokens) == (2, 1500 + 1820)
    assert found.computed == 1500 + 300
    assert list(found.first_token_s) == [pytest.approx(0.3), 1.5]


def test_conversations_of_a_kind_share_their_opening() -> None:
    found = play(talk(0.0, Turn(0.0, 500, 20)), talk(100.0, Turn(0.0, 400, 20)))
    assert found.computed == 1500 + 400


def test_prompts_are_computed_one_after_the_other() -> None:
    found = play(talk(0.0, Turn(0.0, 1000, 10)), talk(0.0, Turn(0.0, 1000, 10), kind=2))
    assert list(found.first_token_s) == [2.0, 4.0]


def test_who_finds_no_slot_waits_for_one() -> None:
    found = play(*(talk(0.0, Turn(0.0, 1000, 100), kind=kind) for kind in range(3)))
    assert list(found.first_token_s) == [2.0, 4.0, 12.0 + 2.0]


def test_a_replica_that_has_all_requests_has_its_share_of_all() -> None:
    found = play(talk(0.0, Turn(0.0, 1000, 100)), replicas=2)
    assert found.busiest == 2.0


def test_the_mix_is_what_it_says() -> None:
    talks = mix(1.0, 5000.0, Random(5))
    agents = [each for each in talks if each.opening in AGENTS]
    assert 0.27 < len(agents) / len(talks) < 0.33
    prompts = []
    for each in agents:
        size = each.opening[1]
        for turn in each.turns:
            size += turn.tokens
            prompts.append(size)
            size += turn.output
    assert 6_900 < sum(prompts) / len(prompts) < 7_900


def test_the_gateways_router_computes_less_than_half_of_least_load_and_no_more_than_its_rivals() -> None:
    engine = Engine()
    found = {name: serve(make(1001), engine, 0.4, replicas=3, agents=0.3, seed=1001) for name, make in RULES.items()}
    tokens = {name: one.computed / one.requests for name, one in found.items()}
    assert tokens["ours"] < 0.5 * tokens["least load"]
    assert tokens["ours"] <= 1.05 * min(tokens["tree"], tokens["hash"])
    assert found["ours"].within_s(0.99) < 0.6 * found["least load"].within_s(0.99)


def test_a_run_is_the_same_for_the_same_seed() -> None:
    runs = [serve(Ours(7), Engine(), 0.2, replicas=3, agents=0.3, seed=7) for _ in range(2)]
    assert runs[0] == runs[1]
