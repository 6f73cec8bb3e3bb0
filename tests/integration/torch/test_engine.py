"""The engine over real weights: SmolLM2, and a random embedding model."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'helexa[torch]'")
np = pytest.importorskip("numpy")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'helexa[torch]'")

from tests.helpers import safetensors_models as models  # noqa: E402
from tests.helpers.torch_tokenizers import byte_level  # noqa: E402

from helexa.neuron.harness.torch.engine import Engine  # noqa: E402
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
    TokenLogprob,
)
from helexa.neuron.harness.torch.shard import LocalRunner, load_shard, whole_model  # noqa: E402

GREEDY = Sampling(temperature=0.0)
CLEAR = 2e-3  # two best logits nearer than this may change places with the shape of a batch
CONTEXT = 2048


class Model:
    def __init__(self, folder: Path, tokenizer: Any) -> None:
        shard = load_shard(whole_model(folder, threads=2), None)
        self.tokenizer = tokenizer
        limits = Limits(CONTEXT, 8, 512, 8 * CONTEXT, shard.config.vocabulary)
        self.engine = Engine(LocalRunner(shard), self.tokenizer, limits, name="tested", eos=shard.config.eos)

    def chat(self, text: str) -> tuple[int, ...]:
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return tuple(self.tokenizer.encode(prompt, add_special_tokens=False).ids)

    def ask(self, request: Request) -> queue.SimpleQueue[Event]:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.engine.submit(request, events.put)
        return events


def all_of(events: queue.SimpleQueue[Event]) -> list[Event]:
    got = [events.get(timeout=100)]
    while not isinstance(got[-1], Finished | Failed):
        got.append(events.get(timeout=100))
    assert isinstance(got[-1], Finished), got[-1]
    return got


def text_of(got: list[Event]) -> str:
    return "".join(e.text for e in got if isinstance(e, Text))


def logprobs_of(got: list[Event]) -> list[TokenLogprob]:
    return [lp for e in got if isinstance(e, Text) for lp in e.logprobs]


def assert_same_answer(got: list[TokenLogprob], want: list[TokenLogprob]) -> None:
    """Token by token, up to where the two best lie so near that either is right."""
    for mine, other in zip(got, want, strict=True):
        if mine.id != other.id:
            assert other.top[0].logprob - other.top[1].logprob < CLEAR
            return
        assert abs(mine.logprob - other.logprob) < 1e-2


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Model]:
    folder = models.smollm2()
    model = Model(folder, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
    yield model
    model.engine.close()


def test_a_question_with_one_answer_gets_it(smollm2: Model) -> None:
    got = all_of(smollm2.ask(Request(smollm2.chat("What is the capital of France?"), max_tokens=20, sampling=GREEDY)))
    assert "Paris" in text_of(got)
    assert got[-1].reason == "stop"  # type: ignore[union-attr]


def test_several_at_once_say_what_each_says_alone(smollm2: Model) -> None:
    topics = ["a fox", "the sea", "a clock", "bread"]
    requests = [
        Request(smollm2.chat(f"Tell me about {t}."), max_tokens=10 + n, sampling=GREEDY, ignore_eos=True, logprobs=2)
        for n, t in enumerate(topics)
    ]
    alone = [logprobs_of(all_of(smollm2.ask(r))) for r in requests]
    smollm2.engine._scheduler.restart(8 * CONTEXT)  # nothing runs: the cache is emptied
    waiting = [smollm2.ask(r) for r in requests]
    for events, want in zip(waiting, alone, strict=True):
        assert_same_answer(logprobs_of(all_of(events)), want)


def test_a_second_turn_from_the_cache_says_what_it_says_anew(smollm2: Model) -> None:
    first = smollm2.chat("Count the apples: " + "one apple, " * 60)
    got = all_of(smollm2.ask(Request(first, max_tokens=24, sampling=GREEDY, ignore_eos=True, logprobs=0)))
    answer = tuple(lp.id for lp in logprobs_of(got))
    turn = Request((*first, *answer, *smollm2.chat("And the pears?")), max_tokens=12, sampling=GREEDY, logprobs=2)
    cached = all_of(smollm2.ask(turn))
    assert cached[-1].usage.cached == len(first) + len(answer) - 1  # type: ignore[union-attr]
    smollm2.engine._scheduler.restart(8 * CONTEXT)  # nothing runs: the cache is emptied
    anew = all_of(smollm2.ask(turn))
    assert anew[-1].usage.cached == 0  # type: ignore[union-attr]
    assert_same_answer(logprobs_of(cached), logprobs_of(anew))


def test_a_cancel_within_a_long_prefill_is_heard_after_the_chunk_at_hand(smollm2: Model) -> None:
    """How long a chunk takes is for Pace's own tests, and for bench.torch_engine.cancel."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    prompt = tuple(range(100, 100 + CONTEXT - 10))
    handle = smollm2.engine.submit(Request(prompt, max_tokens=4, progress=True), events.put)
    assert all(isinstance(events.get(timeout=60), Progress) for _ in range(2))
    smollm2.engine.cancel(handle)
    late = 0
    while not isinstance(last := events.get(timeout=60), Finished):
        late += 1
    assert late <= 2  # of a step that had ended before, and of the one at hand
    assert last.reason == "cancelled"
    assert 0 < last.timings.prompt_n < len(prompt)


def test_an_answer_is_bound_to_a_schema(smollm2: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer", "maximum": 99999999}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    asked = smollm2.chat("Name the capital of France and how many people live there, as JSON.")
    got = all_of(
        smollm2.ask(Request(asked, max_tokens=80, sampling=GREEDY, grammar=Grammar("json_schema", json.dumps(schema))))
    )
    value = json.loads(text_of(got))
    assert value.keys() == {"city", "people"}
    assert got[-1].reason == "stop"  # type: ignore[union-attr]


def test_a_seed_gives_the_same_words_again(smollm2: Model) -> None:
    def ask(seed: int) -> str:
        sampling = Sampling(temperature=1.0, top_p=0.95, seed=seed)
        return text_of(all_of(smollm2.ask(Request(smollm2.chat("Tell me a story."), max_tokens=12, sampling=sampling))))

    first = ask(1)
    assert ask(1) == first
    assert len({ask(seed) for seed in range(4)}) > 1


def test_embeddings_in_a_batch_are_those_alone() -> None:
    model = Model(models.random_model("qwen3-embedding"), byte_level())
    try:
        prompts = [tuple(range(5, 5 + n)) for n in (3, 40, 200, 17)]
        for pooling in ("last", "mean"):
            requests = [Request(p, pooling=pooling) for p in prompts]  # type: ignore[arg-type]
            alone = [all_of(model.ask(r))[-2] for r in requests]
            together = [all_of(events)[-2] for events in [model.ask(r) for r in requests]]
            for one, other in zip(alone, together, strict=True):
                assert isinstance(one, Embedded)
                assert isinstance(other, Embedded)
                assert np.allclose(one.vector, other.vector, atol=1e-4)
                assert abs(np.linalg.norm(one.vector) - 1) < 1e-5
    finally:
        model.engine.close()
