"""How long a step may take, over what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.neuron.harness.torch.pace import BESIDE_ANSWERS, LEAST, TARGET_S, Pace


@pytest.mark.parametrize("tokens_s", [40, 90, 500, 3000])
@pytest.mark.parametrize("answers", [False, True])
def test_steps_come_to_take_the_time_they_should(tokens_s: int, answers: bool) -> None:
    pace = Pace(4096)
    longest = 0.0
    for _ in range(30):
        chunk = pace.chunk(answers=answers)
        seconds = 0.05 + chunk / tokens_s  # the weights are read, whatever the chunk
        longest = max(longest, seconds)
        pace.saw(chunk, seconds)
    share = BESIDE_ANSWERS if answers else 1.0
    assert seconds <= TARGET_S * share * 1.1 or chunk == LEAST
    assert seconds >= TARGET_S * share * 0.5
    assert longest <= max(0.86, 1.6 * TARGET_S)  # 32 tokens before anything is known, at 40 a second


@given(st.integers(1, 5000), st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 100)), max_size=30), st.booleans())
def test_a_chunk_is_at_least_one_token_and_never_over_the_most(
    most: int, seen: list[tuple[int, float]], answers: bool
) -> None:
    pace = Pace(most)
    for tokens, seconds in seen:
        assert 1 <= pace.chunk(answers=answers) <= most
        pace.saw(tokens, seconds)
    assert 1 <= pace.chunk(answers=answers) <= most


def test_the_short_end_of_a_prompt_does_not_slow_the_next_one_down() -> None:
    pace = Pace(512)
    for _ in range(10):
        pace.saw(pace.chunk(answers=False), 0.2)
    before = pace.chunk(answers=False)
    pace.saw(3, 0.2)
    assert pace.chunk(answers=False) == before
