"""The memory of keys and values is what the scheduler says it is, and holds what it should."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'helexa[torch]'")

from helexa.neuron.harness.torch.blocks import BLOCK  # noqa: E402
from helexa.neuron.harness.torch.kv import Slabs  # noqa: E402
from helexa.neuron.harness.torch.scheduler import Scheduler, Sequence  # noqa: E402


@pytest.mark.parametrize("seed", range(5))
def test_slabs_take_no_more_than_the_scheduler_counts_and_keep_their_tokens(seed: int) -> None:
    rng = random.Random(seed)
    kv_tokens = 12 * BLOCK
    slabs = Slabs(1, 1, 1, torch.float32, torch.device("cpu"))
    scheduler = Scheduler(rows=3, chunk=50, kv_tokens=kv_tokens, context=5 * BLOCK, ahead=8)
    ends: dict[Sequence, int] = {}
    for n in range(200):
        if n % 4 == 0 and n < 80:
            prompt = [i % 50 for i in range(rng.choice([10, 100, 150]))] + [rng.randrange(50) for _ in range(40)]
            answer = rng.choice([1, 30, 120])
            ends[scheduler.add(prompt)] = len(prompt) + answer
        plan = scheduler.plan()
        if plan is None:
            continue
        for number in plan.step.drops:
            slabs.drop(number)
        for copy in plan.step.copies:
            slabs.copy(copy)
        for row in plan.step.rows:
            end = row.start + len(row.tokens)
            slabs.reserve(row.slab, row.start, end, row.room)
            slabs.views(row.slab, row.start, end, [0]).write[0][:] = torch.tensor(row.tokens).view(1, 1, -1, 1)
        assert slabs.tokens <= kv_tokens
        for part in plan.parts:
            assert part.sequence.slab is not None
            end = part.sequence.done + part.count
            held = slabs.views(part.sequence.slab.number, 0, end, [0]).keys[0][0].flatten().tolist()
            assert held == part.sequence.chain.tokens[:end]
        scheduler.done(plan)
        for part in plan.parts:
            if part.wanted:
                scheduler.append(part.sequence, rng.randrange(50))
                if len(part.sequence) >= ends[part.sequence]:
                    scheduler.finish(part.sequence)
    assert len(ends) == 20
    assert sum(s.slab is None for s in ends) > 10
