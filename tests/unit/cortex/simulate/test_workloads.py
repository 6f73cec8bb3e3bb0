from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from helexa.cortex.simulate.workloads import DAY_S, GB, Arrivals, drawn_models, drawn_nodes, generate, standard

NAMES = [f"m{i}" for i in range(20)]


@pytest.mark.parametrize("name", ["W1", "W2"])
def test_a_workload_follows_from_its_seed(name: str) -> None:
    assert standard(name, 5) == standard(name, 5)
    assert standard(name, 5).requests != standard(name, 6).requests


def test_independent_arrivals_have_the_rate_and_the_ranks_that_were_asked_for() -> None:
    requests = generate(NAMES, Arrivals(0.5, 10_000), Random(1))
    assert requests[-1].t == pytest.approx(20_000, rel=0.05)
    asked = Counter(r.model for r in requests)
    assert asked["m0"] / asked["m1"] == pytest.approx(2, rel=0.15)  # Zipf 1.0


def test_conversations_have_their_length_pauses_and_growing_prompts() -> None:
    requests = generate(NAMES, Arrivals(0.5, 40_000, bursts=True), Random(2))
    assert [r.t for r in requests] == sorted(r.t for r in requests)
    talks: dict[int, list[int]] = {}
    for r in requests:
        talks.setdefault(r.prefix[0], []).append(r.prompt_tokens)
    turns = list(talks.values())
    assert sum(map(len, turns)) / len(turns) == pytest.approx(12, rel=0.1)
    assert all(prompts == sorted(prompts) for prompts in turns)


def test_a_day_has_busy_and_quiet_hours_around_its_rate() -> None:
    requests = generate(NAMES, Arrivals(1.0, 90_000, bursts=True), Random(3))
    day = [r for r in requests if r.t < DAY_S]
    assert len(day) == pytest.approx(DAY_S, rel=0.1)
    busy = sum(DAY_S * 0.125 < r.t < DAY_S * 0.375 for r in day)
    quiet = sum(DAY_S * 0.625 < r.t < DAY_S * 0.875 for r in day)
    assert busy > 3 * quiet


def test_models_and_nodes_are_of_the_sizes_that_are_told() -> None:
    rng = Random(4)
    sizes = [m.mb / GB for m in drawn_models(500, rng)]
    assert min(sizes) >= 1
    assert max(sizes) <= 48
    assert sum(s < 7 for s in sizes) == pytest.approx(250, rel=0.15)  # log-uniform: half below the root of 48
    assert sum(sum(n.devices_mb) for n in drawn_nodes(50, rng)) / GB == pytest.approx(2000, rel=0.06)
