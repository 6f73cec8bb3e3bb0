"""Our decoder against transformers on the same weights, token by token: one rank, and several as threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'helexa[torch]'")

from tests.helpers import safetensors_models as models  # noqa: E402

from helexa.neuron.harness.torch.families import read_config  # noqa: E402
from helexa.neuron.harness.torch.shard import LocalRunner, Shard, ShardSpec, load_shard, whole_model  # noqa: E402
from helexa.neuron.harness.torch.step import Copy, Row, Step, StepFailed  # noqa: E402
from helexa.neuron.tp.collective_shm import ShmCollective  # noqa: E402
from helexa.neuron.tp.comm import Comm  # noqa: E402
from helexa.neuron.tp.partition import partition  # noqa: E402

# How a prompt is cut into steps: whole; a chunk and the rest; single tokens amid chunks, past the edge of a window.
CUTS = [[], [40], [10, 11, 12, 13, 50, 51]]
EQUAL_WITHIN = 1e-4  # of the logits' standard deviation
SPLIT_WITHIN = 1e-3
MARGIN = 1e-4  # an expert chosen by less may be another one here
EVERY = [*models.FAMILIES, "smollm2"]


def folder_of(family: str) -> Path:
    return models.smollm2() if family == "smollm2" else models.random_model(family)


def answers(shard: Shard, tokens: Sequence[int], cuts: Sequence[int], hidden: bool, slab: int = 1) -> Any:
    """Of every position, on rank 0."""
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        parts.append(shard.step(Step([Row(slab, start, list(tokens[start:end]), end - start)], hidden=hidden)))
    shard.step(Step([], drops=[slab]))
    return None if parts[0] is None else torch.cat(parts)


def assert_same(got: Any, reference: models.Reference, within: float) -> None:
    """Positions whose routing is a near tie are left out, and have to be few."""
    known = reference.logits
    assert got.shape == known.shape
    if len(reference.margins):
        near = reference.margins < MARGIN
        assert near.float().mean() < 0.01
        got, known = got[~near], known[~near]
    assert (got - known).abs().max() / known.std() < within


@pytest.mark.parametrize("family", EVERY)
def test_logits_are_the_references_at_every_position_however_the_prompt_is_cut(family: str) -> None:
    reference = models.reference(family)
    shard = load_shard(whole_model(folder_of(family)), None)
    hidden = shard.config.pooling is not None
    for cuts in CUTS:
        assert_same(answers(shard, reference.tokens, cuts, hidden), reference, EQUAL_WITHIN)


@pytest.mark.parametrize("family", ["llama-biased", "qwen3", "gemma3", "mixtral", "qwen3-embedding"])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "int8"])
def test_narrower_weights_answer_nearly_as_the_reference(family: str, dtype: str) -> None:
    reference = models.reference(family)
    shard = load_shard(whole_model(folder_of(family), dtype=dtype), None)
    for cuts in ([40, 41, 42], list(range(90, 100))):
        got = answers(shard, reference.tokens, cuts, shard.config.pooling is not None)
        off = (got - reference.logits).abs().median() / reference.logits.std()
        assert off < 0.05


def split(folder: Path, comm: Path, weights: Sequence[float], do: Any, dtype: str = "f32") -> list[Any]:
    """do(shard) of each rank, on a thread of its own, over one shared mapping."""
    world = len(weights)
    shares = list(partition(read_config(folder).shape, world, weights))
    made = Comm.new("shm", comm)

    def one(rank: int) -> Any:
        group = ShmCollective(made, rank, world, timeout_s=60)
        try:
            return do(load_shard(ShardSpec(str(folder), rank, world, shares, dtype, "cpu", 1), group))
        finally:
            group.close()

    with ThreadPoolExecutor(world) as threads:
        return [future.result() for future in [threads.submit(one, rank) for rank in range(world)]]


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("smollm2", [1, 1, 1]),
        ("smollm2", [2, 1]),
        *[(family, [1, 1]) for family in models.FAMILIES],
        *[(family, [1, 2, 1]) for family in models.FAMILIES],  # groups are split: 4 query heads of 2 KV heads
        ("llama-4-groups", [3, 1]),
        ("llama-4-groups", [1, 1, 1, 1]),
        ("llama-4-groups", [3, 1, 1, 1, 1]),  # 8 query heads of 4 KV heads, split unevenly
        ("mixtral", [1, 1, 1, 1]),
    ],
)
def test_ranks_together_give_the_references_logits(tmp_path: Path, family: str, weights: list[float]) -> None:
    reference = models.reference(family)

    def do(shard: Shard) -> Any:
        return answers(shard, reference.tokens, [40, 41, 42], shard.config.pooling is not None)

    first, *others = split(folder_of(family), tmp_path, weights, do)
    assert others == [None] * len(others)
    assert_same(first, reference, SPLIT_WITHIN)


def test_ranks_of_odd_widths_share_eight_bit_weights(tmp_path: Path) -> None:
    reference = models.reference("llama-biased")
    shares = partition(read_config(folder_of("llama-biased")).shape, 2)
    assert shares[1].mlp.size % 32  # 200 columns are dealt out as 128 and 72

    def do(shard: Shard) -> Any:
        return answers(shard, reference.tokens, [40, 41, 42], hidden=False)

    first, _ = split(folder_of("llama-biased"), tmp_path, [1, 1], do, dtype="int8")
    assert (first - reference.logits).abs().median() / reference.logits.std() < 0.05


@pytest.mark.parametrize("family", ["llama3", "gemma3", "mixtral"])
def test_sequences_that_run_side_by_side_answer_as_alone(family: str) -> None:
    reference = models.reference(family)
    runner = LocalRunner(load_shard(whole_model(folder_of(family)), None))
    tokens, known = reference.tokens, reference.logits
    starts = {1: 30, 2: 45, 3: 60}
    runner.step(Step([Row(slab, 0, tokens[:start], 0) for slab, start in starts.items()]))
    for n in range(20):  # one in bigger bites, the others token by token
        rows = [Row(slab, start + n, tokens[start + n : start + n + 1]) for slab, start in starts.items() if slab < 3]
        rows.append(Row(3, 60 + 2 * n, tokens[60 + 2 * n : 62 + 2 * n]))
        got = runner.step(Step(rows))
        expected = known[[30 + n, 45 + n, 61 + 2 * n]]
        assert (got - expected).abs().max() / known.std() < EQUAL_WITHIN


def test_a_slab_copied_or_gone_back_in_goes_on_as_one_computed() -> None:
    reference = models.reference("llama")
    tokens, known = reference.tokens, reference.logits
    runner = LocalRunner(load_shard(whole_model(folder_of("llama")), None))
    runner.step(Step([Row(1, 0, tokens[:80], 0)]))
    for step in (
        Step([Row(2, 50, tokens[50:90])], copies=[Copy(1, 2, 50)]),
        Step([Row(1, 20, tokens[20:90])]),  # what slab 1 held beyond 20 is forgotten
        Step([Row(1, 0, tokens[:90])], drops=[1]),
    ):
        assert (runner.step(step) - known[89]).abs().max() / known.std() < EQUAL_WITHIN


def test_a_step_that_asks_for_nothing_answers_nothing_and_one_past_what_is_held_fails() -> None:
    runner = LocalRunner(load_shard(whole_model(folder_of("llama")), None))
    assert runner.step(Step([Row(1, 0, [5, 6], 0)])) is None
    assert runner.step(Step([], drops=[1, 99])) is None
    with pytest.raises(StepFailed, match="slab 1 holds 0 tokens, and a step starts at 7"):
        runner.step(Step([Row(1, 7, [5])]))
    runner.close()
    with pytest.raises(StepFailed, match="closed"):
        runner.step(Step([Row(1, 0, [5])]))
