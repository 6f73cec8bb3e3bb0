"""Sampling against the plain formulas, and exactly: which tokens are left, with which probabilities, and that the line
of them is hit where it should be."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

np = pytest.importorskip("numpy", reason="numpy is not installed: pip install 'helexa[torch]'")

from helexa.neuron.harness.torch import sampling as module  # noqa: E402
from helexa.neuron.harness.torch.request import Sampling  # noqa: E402
from helexa.neuron.harness.torch.sampling import (  # noqa: E402
    Chooser,
    NoNumbers,
    distribution,
    landing,
    largest,
    logprobs_of,
    random_at,
)

# Quarters and eighths: sums are exact, equals are frequent.
logits = st.lists(st.integers(-80, 80).map(lambda n: n / 4), min_size=2, max_size=60)


def reference(row: list[float], s: Sampling) -> dict[int, float]:
    """The filters as they are defined, over a whole sorted list, in double precision."""
    left = [(value / s.temperature, -i) for i, value in enumerate(row) if value > -math.inf]
    best = max(left)[0]
    left.sort(reverse=True)
    kept = [(-i, math.exp(value - best)) for value, i in left]

    def normal(pairs: list[tuple[int, float]]) -> list[tuple[int, float]]:
        whole = math.fsum(w for _, w in pairs)
        return [(i, w / whole) for i, w in pairs]

    kept = normal(kept)
    if s.top_k:
        kept = normal(kept[: s.top_k])
    if s.top_p < 1.0:
        before, nucleus = 0.0, []
        for i, p in kept:
            if nucleus and before >= s.top_p:
                break
            nucleus.append((i, p))
            before += p
        kept = normal(nucleus)
    if s.min_p:
        kept = normal([(i, p) for i, p in kept if p >= s.min_p * kept[0][1]])
    return dict(kept)


def row_of(values: list[float]) -> Any:
    return np.array(values, np.float32)


@settings(max_examples=400, deadline=None)
@given(
    logits,
    st.sampled_from([0.25, 0.7, 1.0, 1.5, 20.0]),
    st.sampled_from([0, 1, 3, 20, 1000]),
    st.sampled_from([0.0001, 0.3, 0.77, 0.95, 1.0]),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_what_the_filters_leave_is_what_their_formulas_say(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, probabilities = distribution(row_of(values), s)
    got = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    want = reference(values, s)
    assert math.isclose(sum(got.values()), 1.0, rel_tol=1e-6)
    # What is less has no exact number in float32, where it has one at all.
    got, want = ({i: p for i, p in some.items() if p > 1e-37} for some in (got, want))
    for i in got.keys() ^ want.keys():  # only where rounding decides, at the very edge of a filter
        assert _at_an_edge(values, s), (i, got, want)
    if got.keys() == want.keys():
        assert all(math.isclose(got[i], want[i], rel_tol=1e-4, abs_tol=1e-9) for i in got)


def _at_an_edge(values: list[float], s: Sampling) -> bool:
    nudged = [Sampling(s.temperature, s.top_k, s.top_p + d, s.min_p) for d in (-1e-5, 1e-5) if s.top_p < 1.0]
    nudged += [Sampling(s.temperature, s.top_k, s.top_p, s.min_p * (1 + d)) for d in (-1e-5, 1e-5)]
    return any(reference(values, n).keys() != reference(values, s).keys() for n in nudged)


@pytest.mark.parametrize("size", [60, 5000])
@pytest.mark.parametrize("spread", [0.001, 1.0, 10.0])
@pytest.mark.parametrize("s", [Sampling(top_p=0.9), Sampling(top_k=50), Sampling(min_p=0.01), Sampling(0.3, 40, 0.8)])
def test_flat_and_steep_rows_are_filtered_alike(size: int, spread: float, s: Sampling) -> None:
    row = (np.random.default_rng(7).standard_normal(size) * spread).astype(np.float32)
    ids, probabilities = distribution(row, s)
    want = reference(row.tolist(), s)
    got = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    assert len(got.keys() ^ want.keys()) <= 2  # float32 against float64, at the edge of the nucleus
    assert all(math.isclose(got[i], want[i], rel_tol=1e-3) for i in list(want)[:5])


@given(logits, st.integers(0, 5))
def test_a_token_is_chosen_where_the_random_number_falls_on_the_line(values: list[float], seed: int) -> None:
    """The distribution of the choices, without a statistic: each token is hit on exactly its own stretch."""
    s = Sampling(temperature=0.7, top_p=0.9)
    ids, probabilities = distribution(row_of(values), s)
    line = np.cumsum(probabilities)
    near = 1e-6  # of float32
    chooser = Chooser(s, (), len(values), seed)
    points = [float(p) for edge in (0.0, *line[:-1]) for p in (edge + near, edge - near) if 0 <= p < 1]
    with pytest.MonkeyPatch.context() as patch:
        for at in points:
            patch.setattr(module, "random_at", lambda seed, position, at=at: at)
            assert chooser.choose(row_of(values), 0) == ids[int(np.sum(line <= at))]


@pytest.mark.parametrize("size", [1, 255, 1024, 1025, 5000, 49_152])
def test_a_long_line_is_hit_where_a_running_sum_would_be(size: int) -> None:
    weights = np.exp(np.random.default_rng(size).standard_normal(size) * 2).astype(np.float32)
    weights[::3] = 0.0
    weights[size // 2] += 1.0
    line = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    for at in np.linspace(0.0, 1.0, 200, endpoint=False).tolist():
        hit = landing(weights, at)
        assert weights[hit] > 0
        assert line[hit] >= at - 1e-5
        assert hit == 0 or line[hit - 1] <= at + 1e-5


@pytest.mark.parametrize("size", [10, 5000])
def test_the_end_of_the_line_belongs_to_the_last_that_has_weight(size: int) -> None:
    weights = np.zeros(size, np.float32)
    weights[3] = weights[5] = 0.1
    assert landing(weights, 1.0) == 5
    assert landing(weights, 0.0) == 3


def test_the_random_numbers_are_spread_evenly_and_fixed() -> None:
    numbers = np.array([random_at(seed, position) for seed in range(50) for position in range(200)])
    counts = np.histogram(numbers, bins=20, range=(0.0, 1.0))[0]
    assert counts.sum() == 10_000
    assert counts.min() > 400  # 500 and a bit: fixed numbers, so this cannot fail by chance
    assert counts.max() < 600
    assert random_at(1, 2) == random_at(1 + (1 << 64), 2)
    assert random_at(1, 2) != random_at(2, 1)
    assert len({random_at(-1, n) for n in range(1000)}) == 1000


@given(logits, st.integers(0, 1 << 63), st.integers(0, 1000), st.integers(0, 9))
def test_a_choice_depends_on_nothing_but_row_seed_and_position(
    values: list[float], seed: int, position: int, others: int
) -> None:
    s = Sampling(temperature=1.3, min_p=0.01)
    alone, among = (Chooser(s, (0,), len(values), seed) for _ in range(2))
    for n in range(others):
        Chooser(s, (1,), len(values), n).choose(row_of(values), n)
        among.choose(row_of(values), n)
    assert alone.choose(row_of(values), position) == among.choose(row_of(values), position)


@given(logits)
def test_temperature_0_takes_the_first_of_the_most_likely(values: list[float]) -> None:
    assert Chooser(Sampling(temperature=0.0), (), len(values), 1).choose(row_of(values), 0) == values.index(max(values))


@settings(deadline=None)
@given(
    logits,
    st.lists(st.integers(0, 1), max_size=5),
    st.lists(st.integers(0, 1), max_size=5),
    st.sampled_from([0.5, 1.0, 1.3]),
    st.sampled_from([-1.0, 0.0, 0.5]),
    st.sampled_from([-0.5, 0.0, 1.5]),
    st.dictionaries(st.integers(0, 1), st.sampled_from([-100.0, 2.5, 100.0])),
)
def test_penalties_and_bias_are_what_their_formulas_say(
    values: list[float],
    prompt: list[int],
    answer: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
) -> None:
    s = Sampling(0.0, 0, 1.0, 0.0, repetition, presence, frequency, bias)
    want = list(values)
    for i in {*prompt, *answer}:
        want[i] = want[i] / repetition if want[i] > 0 else want[i] * repetition
    for i in set(answer):
        want[i] -= presence + frequency * answer.count(i)
    for i, more in bias.items():
        want[i] += more
    chooser = Chooser(s, tuple(prompt), len(values), 0)
    for token in answer:
        chooser.took(token)
    row = row_of(values)
    assert np.allclose(chooser._adjusted(row), want, atol=1e-4)
    assert row.tolist() == values  # left as it was


def test_only_allowed_tokens_are_chosen() -> None:
    allowed = np.array([False, True, False, True])
    for temperature in (0.0, 5.0):
        for seed in range(20):
            chooser = Chooser(Sampling(temperature=temperature), (), 4, seed)
            assert chooser.choose(row_of([9.0, 1.0, 9.0, 0.5]), 0, allowed) in (1, 3)


def test_padding_beyond_the_vocabulary_is_never_chosen() -> None:
    assert Chooser(Sampling(temperature=0.0), (), 2, 0).choose(row_of([1.0, 2.0, 99.0]), 0) == 1


@pytest.mark.parametrize("values", [[math.nan, 1.0], [-math.inf, -math.inf], [1.0, math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_is_told(values: list[float], temperature: float) -> None:
    with pytest.raises(NoNumbers):
        Chooser(Sampling(temperature=temperature), (), 2, 0).choose(row_of(values), 0)


@given(logits, st.integers(1, 70))
def test_the_largest_are_those_of_a_whole_sort(values: list[float], count: int) -> None:
    want = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert largest(row_of(values), count).tolist() == want


@given(logits, st.integers(0, 20))
def test_logprobs_are_the_logarithm_of_the_softmax(values: list[float], top: int) -> None:
    whole = math.log(math.fsum(math.exp(v) for v in values))
    got = logprobs_of(row_of(values), 1, top, [bytes([i]) for i in range(len(values))])
    assert math.isclose(got.logprob, values[1] - whole, abs_tol=1e-4)
    assert (got.id, got.data) == (1, b"\x01")
    want = sorted(range(len(values)), key=lambda i: (-values[i], i))[:top]
    assert [t.id for t in got.top] == want
    assert all(math.isclose(t.logprob, values[t.id] - whole, abs_tol=1e-4) for t in got.top)
