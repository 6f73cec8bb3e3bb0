"""Where a model's steps are computed: in this process, or in it and ranks beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from helexa.neuron.harness.torch.config import ModelConfig
from helexa.neuron.harness.torch.step import Runner
from helexa.neuron.tp.partition import partition


def open_runner(
    spec: dict[str, Any], config: ModelConfig, progress: Callable[[float], None], on_failed: Callable[[str], None]
) -> Runner:
    """Raises RuntimeError with a reason, MemoryError. on_failed: told of a rank's end while no step runs."""
    from helexa.neuron.harness.torch.shard import LocalRunner, ShardSpec, load_shard

    devices = spec["devices"]
    shares = list(partition(config.shape, len(devices), spec["weights"]))
    specs = [
        ShardSpec(
            folder=spec["folder"],
            rank=rank,
            world_size=len(devices),
            shares=shares,
            dtype=spec["dtype"],
            device=device,
            threads=spec["threads"],
        )
        for rank, device in enumerate(devices)
    ]
    return LocalRunner(load_shard(specs[0], None, progress))
