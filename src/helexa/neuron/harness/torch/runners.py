"""Where a model's steps are computed: in this process, or in it and ranks beside it; watched by the daemon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from helexa.neuron.harness.torch.config import ModelConfig
from helexa.neuron.harness.torch.ranks import load_ranked, thread_shares
from helexa.neuron.harness.torch.shard import LocalRunner, ShardSpec, load_shard
from helexa.neuron.harness.torch.step import Runner
from helexa.neuron.harness.torch.watched import WatchedRunner
from helexa.neuron.step_watch import StepReport, report_of
from helexa.neuron.tp.leader import Group
from helexa.neuron.tp.partition import partition


def open_runner(
    spec: dict[str, Any], config: ModelConfig, progress: Callable[[float], None], on_failed: Callable[[str], None]
) -> Runner:
    """spec: the plan's. on_failed: told of a rank's end while no step runs. Raises what load_shard and load_ranked do;
    nothing is left then."""
    socket = Path(spec["socket"])
    shards = shard_specs(spec, config)
    report = StepReport.create(report_of(socket))
    if len(shards) == 1:
        return WatchedRunner(LocalRunner(load_shard(shards[0], None, progress)), report)
    group = Group(backend_of(spec["devices"]), socket.parent, tuple(spec["device_indices"]))
    told = [msgspec.to_builtins(shard) for shard in shards]
    runner = load_ranked(told, group, progress=progress, on_failed=on_failed)
    report.ranks(runner.pids)
    return WatchedRunner(runner, report)


def shard_specs(spec: dict[str, Any], config: ModelConfig) -> list[ShardSpec]:
    """What each rank is told, by rank. The shares are computed here alone."""
    devices: list[str] = spec["devices"]
    shares = list(partition(config.shape, len(devices), spec["weights"]))
    threads = thread_shares(spec["threads"], len(devices))
    return [
        ShardSpec(spec["folder"], rank, len(devices), shares, spec["dtype"], device, threads[rank])
        for rank, device in enumerate(devices)
    ]


def backend_of(devices: list[str]) -> str:
    """NCCL between GPUs; the ranks of one host's CPU share memory."""
    return "shm" if devices[0] == "cpu" else "nccl"
