"""The engine's loop over a runner that computes nothing: the next token is the last one plus 1."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from helexa.core.errors import BadRequest, ContextLengthExceeded, ShuttingDown
from helexa.neuron.harness.torch.request import Event, Failed, Finished, Limits, Request, Text
from helexa.neuron.harness.torch.step import Step

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'helexa[torch]'")

from helexa.neuron.harness.torch.engine import Engine  # noqa: E402

VOCABULARY = 32


class Counting:
    def __init__(self) -> None:
        self.closed = False

    def step(self, step: Step) -> Any:
        wanted = [t for row in step.rows for t in row.tokens[len(row.tokens) - row.wanted :]]
        return torch.nn.functional.one_hot((torch.tensor(wanted) + 1) % VOCABULARY, VOCABULARY).float()

    def close(self) -> None:
        self.closed = True


class Letters:
    """A tokenizer whose token i is the i-th letter."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def collect(events: queue.SimpleQueue[Event]) -> list[Event]:
    got = []
    while not got or not isinstance(got[-1], Finished | Failed):
        got.append(events.get(timeout=10))
    return got


@pytest.fixture
def engine() -> Any:
    made = Engine(Counting(), Letters(), Limits(64, 4, 16, 256, VOCABULARY), name="tiny", eos={25})
    yield made
    made.close()


def test_an_answer_goes_on_to_its_limit(engine: Engine) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(Request((0, 1), max_tokens=3), events.put)
    got = collect(events)
    assert "".join(e.text for e in got if isinstance(e, Text)) == "cde"
    assert isinstance(got[-1], Finished)
    assert (got[-1].reason, got[-1].usage.prompt, got[-1].usage.completion) == ("length", 2, 3)


def test_an_answer_ends_at_an_end_token(engine: Engine) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(Request((21, 22)), events.put)
    got = collect(events)
    assert "".join(e.text for e in got if isinstance(e, Text)) == "xy"
    assert isinstance(got[-1], Finished)
    assert got[-1].reason == "stop"


@pytest.mark.parametrize("prompt", [(), (-1,), (VOCABULARY,)])
def test_a_prompt_that_cannot_be_is_refused(engine: Engine, prompt: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest):
        engine.submit(Request(prompt), lambda event: None)


def test_a_prompt_over_the_context_is_refused_with_both_figures(engine: Engine) -> None:
    with pytest.raises(ContextLengthExceeded, match="64 tokens"):
        engine.submit(Request((1,) * 64), lambda event: None)


def test_nothing_is_taken_up_after_close(engine: Engine) -> None:
    engine.close()
    with pytest.raises(ShuttingDown):
        engine.submit(Request((1,)), lambda event: None)
