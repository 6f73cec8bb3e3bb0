from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.neuron.harness.torch.step import Row, Step, StepFailed
from helexa.neuron.harness.torch.watched import Shape, UsualTimes, WatchedRunner, shape_of
from helexa.neuron.step_watch import Phase, StepReport

shapes = st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 20))


class Looking:
    """A runner that looks at what is reported while it steps."""

    def __init__(self, report: StepReport) -> None:
        self.phases: list[int] = []
        self.usual_us: list[int] = []
        self.fails = False
        self._report = report

    def step(self, step: Step) -> object:
        self.phases.append(self._report._words[2])
        self.usual_us.append(self._report._words[4])
        if self.fails:
            raise StepFailed("no")
        return step

    def close(self) -> None:
        pass


def test_a_step_is_reported_while_it_runs_and_never_after(tmp_path: Path) -> None:
    report = StepReport.create(tmp_path / "r")
    runner = Looking(report)
    watched = WatchedRunner(runner, report)
    step = Step(rows=[Row(1, 0, [5])])
    assert watched.step(step) is step
    watched.step(step)
    assert runner.phases == [Phase.FIRST, Phase.STEP]
    assert runner.usual_us[0] == 0
    assert report._words[2] == Phase.IDLE
    runner.fails = True
    with pytest.raises(StepFailed):
        watched.step(step)
    assert report._words[2] == Phase.IDLE


def test_shapes_are_alike_by_powers_of_two() -> None:
    def one(tokens: int, start: int) -> Shape:
        return shape_of(Step(rows=[Row(1, start, [0] * tokens)]))

    assert one(1, 600) == one(1, 900) != one(1, 1100)
    assert one(300, 0) == one(500, 0) != one(600, 0)


@given(st.lists(st.tuples(shapes, st.floats(0.001, 10)), min_size=1, max_size=20), shapes)
def test_what_was_never_seen_is_thought_to_take_at_least_what_any_other_did(
    seen: list[tuple[Shape, float]], new: Shape
) -> None:
    usual = UsualTimes()
    assert usual.of(new) is None
    for shape, took_s in seen:
        usual.learn(shape, took_s)
    expected = usual.of(new)
    assert expected is not None
    if new not in dict(seen):
        assert all(expected >= (usual.of(shape) or 0) for shape, _ in seen)


def test_one_slow_step_changes_little() -> None:
    usual = UsualTimes()
    for took_s in [0.1, 0.1, 0.1, 5.0]:
        usual.learn((1, 1, 1), took_s)
    assert usual.of((1, 1, 1)) == pytest.approx(0.59)
