"""The engine's loop over a runner that computes nothing, but notices a step that goes on from the wrong tokens."""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.helpers import torch_tokenizers as kinds

pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'helexa[torch]'")
np = pytest.importorskip("numpy", reason="numpy is not installed: pip install 'helexa[torch]'")

from tests.helpers.torch_steps import FakeRunner, next_token  # noqa: E402

from helexa.core.errors import (  # noqa: E402
    BadRequest,
    ContextLengthExceeded,
    HelexaError,
    Overloaded,
    ShuttingDown,
    UpstreamError,
)
from helexa.neuron.harness.torch.blocks import BLOCK  # noqa: E402
from helexa.neuron.harness.torch.detokenise import Detokeniser, Vocabulary  # noqa: E402
from helexa.neuron.harness.torch.engine import Engine, Handle  # noqa: E402
from helexa.neuron.harness.torch.request import (  # noqa: E402
    Embedded,
    Event,
    Failed,
    Finished,
    Grammar,
    Limits,
    Progress,
    Request,
    Sampling,
    Text,
)
from helexa.neuron.harness.torch.scheduler import Plan  # noqa: E402
from helexa.neuron.harness.torch.step import Step, StepFailed  # noqa: E402

TOKENIZER = kinds.byte_level()
VOCABULARY = Vocabulary(TOKENIZER)
SIZE = TOKENIZER.get_vocab_size()
CONTEXT = 4 * BLOCK
GREEDY = Sampling(temperature=0.0)
WAIT_S = 20


class Told:
    """The events of one request."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.got: list[Event] = []
        self.handle: Handle = engine.submit(request, self._events.put)

    def next(self) -> Event:
        self.got.append(self._events.get(timeout=WAIT_S))
        return self.got[-1]

    def all(self) -> list[Event]:
        while not self.got or not isinstance(self.got[-1], Finished | Failed):
            self.next()
        assert self._events.empty()
        return self.got

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.all() if isinstance(e, Text))

    @property
    def finished(self) -> Finished:
        last = self.all()[-1]
        assert isinstance(last, Finished), last
        return last

    @property
    def error(self) -> HelexaError:
        last = self.all()[-1]
        assert isinstance(last, Failed), last
        return last.error


Start = Callable[..., tuple[Engine, FakeRunner]]


@pytest.fixture
def start() -> Iterator[Start]:
    engines: list[Engine] = []

    def start(
        *, rows: int = 4, chunk: int = 64, kv_tokens: int = 4 * CONTEXT, eos: tuple[int, ...] = (), **more: Any
    ) -> tuple[Engine, FakeRunner]:
        runner = FakeRunner(SIZE, kv_tokens)
        limits = Limits(CONTEXT, rows, chunk, kv_tokens, SIZE)
        engines.append(Engine(runner, TOKENIZER, limits, name="tiny", eos=eos, **more))
        return engines[-1], runner

    yield start
    for engine in engines:
        engine.close()


def greedy(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, SIZE))
    return tokens[len(prompt) :]


def assert_true(value: bool) -> None:
    assert value


def decoded(tokens: list[int]) -> str:
    stream = Detokeniser(VOCABULARY)
    return "".join(stream.feed(token) for token in tokens)


def test_each_of_many_requests_gets_its_own_answer(start: Start) -> None:
    engine, _ = start()
    prompts = [tuple(range(n, n + 10 * n)) for n in range(1, 10)]
    told = [Told(engine, Request(p, max_tokens=30, sampling=GREEDY)) for p in prompts]
    for prompt, answer in zip(prompts, told, strict=True):
        assert answer.text == decoded(greedy(prompt, 30))
        assert answer.finished.reason == "length"
        usage, timings = answer.finished.usage, answer.finished.timings
        assert (usage.prompt, usage.completion) == (len(prompt), 30)
        assert sum(e.tokens for e in answer.got if isinstance(e, Text)) == 30
        assert timings.prompt_n + timings.cache_n == len(prompt)
        assert timings.predicted_n == 30
        assert timings.prompt_ms > 0 < timings.predicted_ms


def test_an_answer_ends_at_an_end_token_which_is_not_shown(start: Start) -> None:
    tokens = greedy((1, 2, 3), 30)
    end = tokens[12]
    engine, _ = start(eos=(end,))
    answer = Told(engine, Request((1, 2, 3), sampling=GREEDY))
    count = tokens.index(end)
    assert answer.text == decoded(tokens[:count])
    assert (answer.finished.reason, answer.finished.stop_reason) == ("stop", None)
    assert answer.finished.usage.completion == count + 1
    longer = Told(engine, Request((1, 2, 3), max_tokens=30, sampling=GREEDY, ignore_eos=True))
    assert longer.text == decoded(tokens)


def test_an_answer_ends_at_a_stop_string_which_is_told(start: Start) -> None:
    engine, _ = start()
    whole = decoded(greedy((7, 8), 60))
    stop = whole[20:24]
    answer = Told(engine, Request((7, 8), max_tokens=60, sampling=GREEDY, stops=("never there", stop)))
    assert answer.text == whole[: whole.index(stop)]
    assert (answer.finished.reason, answer.finished.stop_reason) == ("stop", stop)


def test_an_answer_ends_with_the_context(start: Start) -> None:
    engine, _ = start()
    answer = Told(engine, Request((5,) * (CONTEXT - 3), max_tokens=100, sampling=GREEDY))
    assert answer.finished.reason == "length"
    assert answer.finished.usage.completion == 3


def test_a_second_turn_takes_the_first_one_from_the_cache(start: Start) -> None:
    engine, _ = start()
    prompt = tuple(range(100))
    Told(engine, Request(prompt, max_tokens=20, sampling=GREEDY)).all()
    turn = (*prompt, *greedy(prompt, 20), 1, 2, 3)
    answer = Told(engine, Request(turn, max_tokens=5, sampling=GREEDY))
    assert answer.text == decoded(greedy(turn, 5))
    assert answer.finished.usage.cached == answer.finished.timings.cache_n == 119
    assert answer.finished.timings.prompt_n == 4


def test_progress_is_told_from_the_cached_tokens_to_the_last_chunk(start: Start) -> None:
    engine, _ = start(chunk=32)
    Told(engine, Request(tuple(range(80)), max_tokens=1)).all()
    answer = Told(engine, Request((*range(80), *range(100)), max_tokens=3, progress=True))
    progress = [e for e in answer.all() if isinstance(e, Progress)]
    assert {(p.total, p.cached) for p in progress} == {(180, 80)}
    assert [p.processed for p in progress] == sorted({p.processed for p in progress})
    assert (progress[0].processed, progress[-1].processed) == (80, 180)
    assert answer.got.index(progress[-1]) < min(n for n, e in enumerate(answer.got) if isinstance(e, Text))


def test_logprobs_stand_beside_their_tokens(start: Start) -> None:
    engine, _ = start()
    answer = Told(engine, Request((1, 2), max_tokens=12, sampling=GREEDY, logprobs=2))
    told = [lp for e in answer.all() if isinstance(e, Text) for lp in e.logprobs]
    assert [lp.id for lp in told] == greedy((1, 2), 12)
    expected = 8 - math.log(math.exp(8) + SIZE - 1)
    assert all(math.isclose(lp.logprob, expected, abs_tol=1e-4) for lp in told)
    assert all(lp.top[0].id == lp.id and len(lp.top) == 2 for lp in told)
    assert decoded([lp.id for lp in told]) == answer.text


def test_an_answer_keeps_to_its_grammar(start: Start) -> None:
    engine, _ = start(eos=(0,))
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    bound = {**schema, "additionalProperties": False}
    answers = [
        Told(engine, Request((n,), sampling=Sampling(seed=n), grammar=Grammar("json_schema", json.dumps(bound))))
        for n in range(1, 4)
    ]
    for answer in answers:
        assert set(json.loads(answer.text)) == {"ok"}
        assert answer.finished.reason == "stop"


def test_a_seed_fixes_an_answer_whatever_runs_beside_it(start: Start) -> None:
    alone, idle = start(rows=1)
    crowded, busy = start(rows=8, kv_tokens=3 * CONTEXT // 2)
    crowded._scheduler._ahead = 8
    for runner in (idle, busy):
        runner.logits = lambda tokens: np.cos(np.arange(SIZE) * (sum(tokens) % 97))
    all_there = threading.Event()
    busy.before = lambda step: assert_true(all_there.wait(WAIT_S))
    request = Request(tuple(range(50)), max_tokens=100, sampling=Sampling(seed=11, top_p=0.9))
    others = [Told(crowded, Request((n,) * 40, max_tokens=100)) for n in range(6)]
    among = Told(crowded, request)
    all_there.set()
    want = Told(alone, request).text
    assert among.text == want
    assert crowded._scheduler.preemptions > 0
    other = Request(request.prompt, max_tokens=100, sampling=Sampling(seed=12, top_p=0.9))
    assert Told(alone, other).text != want
    for told in others:
        told.all()


@pytest.mark.parametrize(
    "request_",
    [
        Request(()),
        Request((-1,)),
        Request((SIZE,)),
        Request((1,), max_tokens=0),
        Request((1,), sampling=Sampling(logit_bias={SIZE: 1.0})),
        Request((1,), sampling=Sampling(repetition_penalty=0.0)),
        Request((1,), logprobs=21),
        Request((1,), grammar=Grammar("regex", "(")),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(start: Start, request_: Request) -> None:
    engine, _ = start()
    with pytest.raises(BadRequest):
        engine.submit(request_, lambda event: None)


def test_a_prompt_over_the_context_is_refused_with_both_figures(start: Start) -> None:
    engine, _ = start()
    with pytest.raises(ContextLengthExceeded, match=rf"{CONTEXT} tokens.*{CONTEXT + 5} tokens"):
        engine.submit(Request((1,) * (CONTEXT + 5)), lambda event: None)


def test_limits_that_cannot_work_are_refused(start: Start) -> None:
    with pytest.raises(ValueError, match="context"):
        start(kv_tokens=CONTEXT - 1)


class Gate:
    """Lets steps through one by one."""

    def __init__(self, runner: FakeRunner) -> None:
        self.reached, self.open = threading.Semaphore(0), threading.Semaphore(0)
        runner.before = self._wait

    def _wait(self, step: Step) -> None:
        self.reached.release()
        assert self.open.acquire(timeout=WAIT_S)

    def step(self) -> None:
        assert self.reached.acquire(timeout=WAIT_S)
        self.open.release()


def test_a_cancel_is_heard_after_the_step_at_hand_also_within_a_prefill(start: Start) -> None:
    engine, runner = start(chunk=16)
    gate = Gate(runner)
    answer = Told(engine, Request((1,) * 200, max_tokens=5))
    gate.step()
    assert gate.reached.acquire(timeout=WAIT_S)  # the second step is under way
    engine.cancel(answer.handle)
    gate.open.release()
    assert answer.finished.reason == "cancelled"
    assert answer.finished.usage.completion == 0
    assert len(runner.steps) == 2
    assert engine.running == 0


def test_one_that_waits_for_a_row_can_be_cancelled(start: Start) -> None:
    engine, runner = start(rows=1)
    gate = Gate(runner)
    first, second = (Told(engine, Request((n,), max_tokens=2, sampling=GREEDY)) for n in (1, 2))
    assert gate.reached.acquire(timeout=WAIT_S)
    engine.cancel(second.handle)
    gate.open.release(5)
    assert second.finished.reason == "cancelled"
    assert first.finished.reason == "length"
    engine.cancel(first.handle)  # of no effect
    assert Told(engine, Request((3,), max_tokens=1)).finished.reason == "length"


def test_events_that_cannot_be_told_end_their_request_alone(start: Start) -> None:
    engine, _ = start()

    def broken(event: Event) -> None:
        raise ConnectionError("the client left")

    engine.submit(Request((1,)), broken)
    assert Told(engine, Request((2,), max_tokens=50, sampling=GREEDY)).text == decoded(greedy((2,), 50))
    assert engine.running == 0


def test_a_runner_that_fails_fails_all_with_its_reason(start: Start) -> None:
    reasons: list[str] = []
    engine, runner = start(rows=2, on_failed=reasons.append)
    gate = Gate(runner)
    told = [Told(engine, Request((n,), max_tokens=9)) for n in range(1, 5)]
    gate.step()
    assert gate.reached.acquire(timeout=WAIT_S)

    def fail(step: Step) -> None:
        raise StepFailed("rank 1 is gone")

    runner.before = fail
    gate.open.release()
    for answer in told:
        assert isinstance(answer.error, UpstreamError)
        assert "tiny" in str(answer.error)
        assert "rank 1 is gone" in str(answer.error)
    engine._thread.join(WAIT_S)
    assert reasons == ["rank 1 is gone"]
    assert runner.closed == 1
    with pytest.raises(UpstreamError, match="rank 1 is gone"):
        engine.submit(Request((1,)), lambda event: None)


def test_an_engine_in_which_nothing_can_move_fails_rather_than_turns_in_a_circle(start: Start) -> None:
    reasons: list[str] = []
    engine, _ = start(on_failed=reasons.append)
    engine._scheduler.plan = lambda: Plan(Step([]), [])  # type: ignore[method-assign]
    assert "no request can go on" in str(Told(engine, Request((1,))).error)
    engine._thread.join(WAIT_S)
    assert len(reasons) == 1


def test_a_want_of_memory_is_met_by_a_smaller_budget(start: Start) -> None:
    engine, runner = start()
    left = [1]

    def short(step: Step) -> None:
        if len(runner.steps) > 20 and left[0]:
            left[0] -= 1
            raise MemoryError("no memory for the keys and values")

    runner.before = short
    told = [Told(engine, Request((n,) * 100, max_tokens=80, sampling=GREEDY)) for n in range(1, 5)]
    for n, answer in enumerate(told, start=1):
        assert answer.text == decoded(greedy((n,) * 100, 80))
    assert left == [0]
    assert CONTEXT <= engine._scheduler.pool.capacity * BLOCK < engine.limits.kv_tokens


def test_where_memory_is_still_short_the_largest_request_is_given_up(start: Start) -> None:
    engine, runner = start()

    def short(step: Step) -> None:
        if any(row.start + len(row.tokens) > 100 for row in step.rows):
            raise MemoryError

    runner.before = short
    small = Told(engine, Request((2,) * 50, max_tokens=40, sampling=GREEDY))
    large = Told(engine, Request((1,) * (CONTEXT - 10), max_tokens=1))
    assert isinstance(large.error, Overloaded)
    assert small.text == decoded(greedy((2,) * 50, 40))
    assert Told(engine, Request((3,), max_tokens=9, sampling=GREEDY)).text == decoded(greedy((3,), 9))


def test_close_ends_what_is_left_and_the_runner(start: Start) -> None:
    engine, runner = start(rows=1)
    gate = Gate(runner)
    told = [Told(engine, Request((n,), max_tokens=9)) for n in (1, 2)]
    assert gate.reached.acquire(timeout=WAIT_S)
    closer = threading.Thread(target=engine.close)
    closer.start()
    while not engine._closing:
        pass
    gate.open.release()
    closer.join(WAIT_S)
    assert all(isinstance(t.error, ShuttingDown) for t in told)
    assert runner.closed == 1
    with pytest.raises(ShuttingDown):
        engine.submit(Request((1,)), lambda event: None)


def test_numbers_that_are_none_fail_their_request_alone(start: Start) -> None:
    engine, runner = start()
    runner.logits = lambda tokens: np.full(SIZE + 4, np.nan) if tokens[0] == 9 else runner.one_hot(tokens)
    bad, good = Told(engine, Request((9, 1))), Told(engine, Request((2,), max_tokens=5, sampling=GREEDY))
    assert isinstance(bad.error, UpstreamError)
    assert good.text == decoded(greedy((2,), 5))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_pooled_over_chunks_and_have_length_1(start: Start, pooling: Any) -> None:
    engine, _ = start(chunk=16)
    prompts = [tuple(range(n)) for n in (1, 15, 16, 17, 100, CONTEXT)]
    told = [Told(engine, Request(p, pooling=pooling)) for p in prompts]
    beside = Told(engine, Request((3, 4), max_tokens=20, sampling=GREEDY))
    for prompt, answer in zip(prompts, told, strict=True):
        embedded = answer.all()[-2]
        assert isinstance(embedded, Embedded)
        rows = np.array([[1.0, t, i] for i, t in enumerate(prompt)])
        want = rows[-1] if pooling == "last" else rows.mean(axis=0)
        assert np.allclose(embedded.vector, want / np.linalg.norm(want), atol=1e-5)
        assert answer.finished.usage.prompt == len(prompt)
        assert (answer.finished.usage.completion, answer.finished.usage.cached) == (0, 0)
    assert beside.text == decoded(greedy((3, 4), 20))
