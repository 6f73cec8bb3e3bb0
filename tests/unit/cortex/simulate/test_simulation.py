from __future__ import annotations

from random import Random

import pytest

from helexa.cortex.eviction import POLICIES
from helexa.cortex.simulate import bound
from helexa.cortex.simulate.results import Results
from helexa.cortex.simulate.rivals import best_fit, clairvoyant
from helexa.cortex.simulate.simulation import Rules, Simulation
from helexa.cortex.simulate.trace import Request
from helexa.cortex.simulate.workloads import GB, Arrivals, Workload, drawn_models, drawn_nodes, generate, standard
from helexa.cortex.simulate.world import Model, NodeSpec

ONE_POOL = [NodeSpec("n", (10 * GB,), 1.0 * GB)]


def asked(*when: tuple[float, str]) -> list[Request]:
    return [Request(t, model, 100, 100) for t, model in when]


def run(
    requests: list[Request], models: list[Model], rules: Rules | None = None, nodes: list[NodeSpec] | None = None
) -> Results:
    return Simulation(nodes or ONE_POOL, models, requests, rules or Rules("shipped")).run()


def small(name: str, gb: int = 2, **facts: float) -> Model:
    return Model(name, gb * GB, service_s=facts.get("service_s", 0.5))


def in_turn(count: int) -> list[Request]:
    return asked(*[(float(i), "ab"[i % 2]) for i in range(count)])


def test_a_cold_request_waits_for_its_load_and_a_warm_one_for_nothing() -> None:
    found = run(asked((0, "a"), (100, "a")), [small("a", 3)])
    assert list(found.waits) == [0.0, 5.0]  # 2 s and 3 GB at 1 GB/s
    assert (found.cold_starts, found.cold_requests, found.evictions) == (1, 1, 0)


def test_one_load_serves_all_who_came_meanwhile() -> None:
    found = run(asked(*[(i / 10, "a") for i in range(8)]), [small("a", 3)])
    assert (found.cold_starts, found.cold_requests) == (1, 8)
    assert found.waits[-1] == 5.0


def test_loads_on_a_node_run_one_after_the_other() -> None:
    found = run(asked((0, "a"), (0, "b")), [small("a", 3), small("b", 3)])
    assert list(found.waits) == [5.0, 10.0]


def test_a_model_in_use_stays_and_the_other_waits_for_it() -> None:
    models = [small("a", 8, service_s=14.0), small("b", 8)]
    found = run(asked((0, "a"), (12, "b")), models)
    assert (found.evictions, found.drains) == (1, 0)
    assert 22 <= found.waits[-1] <= 23.1  # a is done at 24; room is looked for each second; 10 s of load


def test_a_model_that_is_never_idle_is_drained_for_one_that_waits() -> None:
    models = [small("a", 8, service_s=3.0), small("b", 8)]
    found = run(
        asked(*[(float(t), "a") for t in range(120)], (120.0, "b"), *[(120.5 + t, "a") for t in range(60)]), models
    )
    assert found.drains == 1
    assert found.refused == 0
    assert max(found.waits) < 60


def test_what_can_never_fit_is_refused_at_once() -> None:
    found = run(asked((0, "a"), (1, "a")), [small("a", 11)])
    assert (found.refused, len(found.waits), found.cold_starts) == (2, 0, 0)


def test_who_waits_too_long_is_refused() -> None:
    models = [small("a", 8, service_s=500.0), small("b", 8)]
    found = run(asked((0, "a"), (20, "b")), models, Rules("impatient", wait_s=30))
    assert found.refused == 1


def crowd(size: int) -> list[Request]:
    """One early request, so that the model is loaded when the rest comes."""
    return asked((0, "a"), *[(100 + i / 100, "a") for i in range(size)])


def test_a_second_copy_is_made_of_a_queue_where_there_is_room() -> None:
    nodes = [*ONE_POOL, NodeSpec("m", (10 * GB,), 1.0 * GB)]
    assert run(crowd(14), [small("a", 8, service_s=30)], nodes=nodes).copies == 1
    assert run(crowd(11), [small("a", 8, service_s=30)], nodes=nodes).copies == 0  # 8 run, 3 wait
    assert run(crowd(14), [small("a", 8, service_s=30)]).copies == 0


def test_only_a_long_queue_takes_the_place_of_another_model() -> None:
    nodes = [*ONE_POOL, NodeSpec("m", (9 * GB,), 1.0 * GB)]
    models = [small("a", 8, service_s=30), small("b", 8)]
    first = asked((0, "a"), (1, "b"))
    for size, copies in ((20, 0), (40, 1)):
        found = run([*first, *crowd(size)[1:]], models, nodes=nodes)
        assert (found.copies, found.evictions) == (copies, copies)


def test_two_models_in_turn_are_served_in_batches() -> None:
    """12 s of load, 1 s apart, one fits: what the gateway is there for."""
    found = run(in_turn(400), [small("a", 10, service_s=0.2), small("b", 10, service_s=0.2)])
    assert found.refused == 0
    assert found.mean_wait_s <= 25
    assert found.cold_starts <= 100


def test_the_same_run_twice_gives_the_same_result() -> None:
    load = tiny(7)
    first, second = (Simulation(load.nodes, load.models, load.requests, Rules("r")).run() for _ in range(2))
    assert first == second


def tiny(seed: int, *, bursts: bool = False) -> Workload:
    rng = Random(seed)
    models = drawn_models(12, rng)
    requests = generate([m.id for m in models], Arrivals(0.3, 600, bursts=bursts), rng)
    return Workload("tiny", drawn_nodes(4, rng), models, requests)


@pytest.mark.parametrize("bursts", [False, True])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_request_ends_and_memory_is_never_over_committed(policy: str, bursts: bool) -> None:
    """That it is not is asserted at every load and unload."""
    load = tiny(3, bursts=bursts)
    found = Simulation(load.nodes, load.models, load.requests, Rules(policy, POLICIES[policy])).run()
    assert len(found.waits) + found.refused == len(load.requests)
    assert all(0 <= n.mean_mb <= n.peak_mb <= n.total_mb for n in found.nodes)
    assert found.evictions <= found.cold_starts * 12


def test_the_future_known_makes_fewer_loads_and_best_fit_more() -> None:
    load = standard("W1", 901)
    shipped, known, fit = (
        Simulation(load.nodes, load.models, load.requests[:3000], rules).run().cold_starts
        for rules in (
            Rules("shipped"),
            Rules("clairvoyant", clairvoyant(load.requests)),
            Rules("best fit", place=best_fit),
        )
    )
    assert known < shipped < fit


@pytest.mark.parametrize("seed", range(5))
def test_on_equal_sizes_in_one_pool_belady_is_the_linear_programmes_bound(seed: int) -> None:
    pytest.importorskip("scipy", reason="the bound is a linear programme")
    rng = Random(seed)
    models = [Model(f"m{i}", GB, service_s=0.001) for i in range(12)]
    order = [f"m{min(11, int(rng.expovariate(0.35)))}" for _ in range(400)]
    requests = [Request(100.0 * at, name) for at, name in enumerate(order)]
    nodes = [NodeSpec("pool", (5 * GB,), 100.0 * GB)]
    found = Simulation(nodes, models, requests, Rules("clairvoyant", clairvoyant(requests))).run()
    assert found.cold_starts == pytest.approx(bound.least_loads(order, dict.fromkeys(order, GB), 5 * GB), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_on_unequal_sizes_no_rule_that_serves_in_order_comes_below_the_bound(seed: int) -> None:
    pytest.importorskip("scipy", reason="the bound is a linear programme")
    rng = Random(seed)
    models = [Model(f"m{i}", rng.randrange(1, 5) * GB, service_s=0.001) for i in range(12)]
    order = [f"m{min(11, int(rng.expovariate(0.35)))}" for _ in range(300)]
    requests = [Request(100.0 * at, name) for at, name in enumerate(order)]
    nodes = [NodeSpec("pool", (10 * GB,), 100.0 * GB)]
    least = bound.least_loads(order, {m.id: m.mb for m in models}, 10 * GB)
    best = min(
        Simulation(nodes, models, requests, rules).run().cold_starts
        for rules in (Rules("clairvoyant", clairvoyant(requests)), Rules("shipped"))
    )
    assert len(set(order)) <= least <= best + 1e-6


def test_what_is_larger_than_all_memory_is_no_load() -> None:
    pytest.importorskip("scipy", reason="the bound is a linear programme")
    assert bound.least_loads(["a", "b", "a", "a"], {"a": 5, "b": 50}, 10) == 1
    assert bound.least_loads(["a", "b", "a", "a"], {"a": 5, "b": 6}, 10) == 3
    assert bound.least_loads(["a", "b", "a", "a"], {"a": 4, "b": 6}, 10) == 2


# prompt caches


def turns(talk: int, start: float, count: int, each_s: float = 5.0) -> list[Request]:
    """A conversation whose prompt grows by 1,000 tokens a turn."""
    ids = [1000 * talk + turn for turn in range(count)]
    return [Request(start + each_s * n, "a", 1000 * (n + 1), 10, ids[: n + 1]) for n in range(count)]


def test_a_prompt_that_was_computed_is_not_computed_again_where_it_is_kept() -> None:
    plain, keeps = Model("a", 2 * GB), Model("a", 2 * GB, cache_tokens=50_000)
    assert run(turns(1, 0.0, 5), [plain]).computed_tokens == 15_000
    found = run(turns(1, 0.0, 5), [keeps])
    assert (found.prompt_tokens, found.computed_tokens) == (15_000, 5_000)
    assert found.cached == pytest.approx(2 / 3)


def test_copies_keep_their_conversations() -> None:
    nodes = [NodeSpec(name, (10 * GB,), 1.0 * GB) for name in "xy"]
    model = Model("a", 8 * GB, slots=1, cache_tokens=50_000)
    rush = [Request(0.1 * n, "a", 100, 500) for n in range(30)]
    talks = sorted((r for n in range(8) for r in turns(n, 200.0 + n, 10, 17.0)), key=lambda r: r.t)
    found = run([*rush, *talks], [model], nodes=nodes)
    assert found.copies == 1
    computed = found.computed_tokens - 30 * 100
    assert computed < 1.5 * 8 * 10_000, "not much more than each token once"
    assert found.refused == 0
