"""A Runner whose steps the daemon watches, with what is usual for a step of each shape."""

from __future__ import annotations

import time
from typing import Any, Final

from helexa.neuron.harness.torch.step import Runner, Step
from helexa.neuron.step_watch import Phase, StepReport

NEW: Final = 0.1  # weight of a new time in what is usual

Shape = tuple[int, int, int]  # tokens computed, rows, tokens held; each by its power of two


class WatchedRunner:
    """As the runner that it is made of."""

    def __init__(self, runner: Runner, report: StepReport) -> None:
        self._runner = runner
        self._report = report
        self._usual = UsualTimes()

    def step(self, step: Step) -> Any:
        """HOT. Adds some microseconds."""
        shape = shape_of(step)
        usual_s = self._usual.of(shape)
        began = time.monotonic()
        self._report.begin(usual_s or 0.0, Phase.FIRST if usual_s is None else Phase.STEP)
        try:
            out = self._runner.step(step)
        finally:
            self._report.end()
        self._usual.learn(shape, time.monotonic() - began)
        return out

    def close(self) -> None:
        self._runner.close()


class UsualTimes:
    """Seconds by shape. Pure."""

    def __init__(self) -> None:
        self._seconds: dict[Shape, float] = {}

    def of(self, shape: Shape) -> float | None:
        """None before the first. Of a shape that never was: at most what others took, for so many times the tokens."""
        known = self._seconds.get(shape)
        if known is not None or not self._seconds:
            return known
        return max(s * 2.0 ** max(0, shape[0] - seen[0], shape[2] - seen[2]) for seen, s in self._seconds.items())

    def learn(self, shape: Shape, took_s: float) -> None:
        before = self._seconds.get(shape, took_s)
        self._seconds[shape] = before + NEW * (took_s - before)


def shape_of(step: Step) -> Shape:
    tokens = held = 0
    for row in step.rows:
        tokens += len(row.tokens)
        held += row.start
    return tokens.bit_length(), len(step.rows).bit_length(), held.bit_length()
