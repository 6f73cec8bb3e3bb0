"""A real model split over real ranks: the reference's logits, and on every rank a part of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'helexa[torch]'")

from tests.helpers import safetensors_models as models  # noqa: E402
from tests.helpers.neuron_daemon import OURS  # noqa: E402

from helexa.neuron.harness.torch.families import read_config  # noqa: E402
from helexa.neuron.harness.torch.ranks import load_ranked  # noqa: E402
from helexa.neuron.harness.torch.shard import ShardSpec  # noqa: E402
from helexa.neuron.harness.torch.step import Row, Step  # noqa: E402
from helexa.neuron.tp.leader import Group  # noqa: E402
from helexa.neuron.tp.partition import partition  # noqa: E402

WITHIN = 1e-3  # of the logits' standard deviation


def specs(folder: Path, weights: Sequence[float]) -> list[dict[str, Any]]:
    shares = list(partition(read_config(folder).shape, len(weights), weights))
    made = [ShardSpec(str(folder), rank, len(weights), shares, "f32", "cpu", 1) for rank in range(len(weights))]
    told: list[dict[str, Any]] = [msgspec.to_builtins(spec) for spec in made]
    return told


@pytest.mark.parametrize(("backend", "weights"), [("shm", [2, 1]), ("shm", [1, 1, 1]), ("gloo", [1, 2])])
def test_ranks_in_processes_of_their_own_give_the_references_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, weights: list[float]
) -> None:
    monkeypatch.setenv("PYTHONPATH", OURS)
    reference = models.reference("smollm2")
    folder = models.smollm2()
    tokens, known = reference.tokens, reference.logits
    told: list[float] = []
    group = Group(backend, tmp_path, tuple(range(len(weights))))
    runner = load_ranked(specs(folder, weights), group, progress=told.append, on_failed=lambda _: None)
    try:
        got = [runner.step(Step([Row(1, 0, tokens[:40], 40), Row(2, 0, tokens[:30], 0)]))]
        for n in range(40, 50):
            both = runner.step(Step([Row(1, n, tokens[n : n + 1]), Row(2, n - 10, tokens[n - 10 : n - 9])]))
            got.append(both[:1])
            assert (both[1] - known[n - 10]).abs().max() / known.std() < WITHIN
        got.append(runner.step(Step([Row(1, 50, tokens[50:], len(tokens) - 50)])))
        assert (torch.cat(got) - known).abs().max() / known.std() < WITHIN
        assert told == sorted(told)
        whole_mb = sum(file.stat().st_size for file in folder.glob("*.safetensors")) >> 20
        for resident_mb, weight in zip(runner.memory_mb(), weights[1:], strict=True):
            assert resident_mb < 350 + whole_mb * (weight / sum(weights) + 0.1), "a rank reads its part alone"
    finally:
        runner.close()
