"""Where a model's steps are computed: in this process, or in it and ranks beside it; watched by the daemon."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from helexa.neuron.harness.torch.config import ModelConfig
from helexa.neuron.harness.torch.ranks import load_ranked
from helexa.neuron.harness.torch.shard import LocalRunner, ShardSpec, load_shard
from helexa.neuron.harness.torch.step import Row, Runner, Step, StepFailed
from helexa.neuron.harness.torch.watched import WatchedRunner
from helexa.neuron.step_watch import StepReport, report_of
from helexa.neuron.tp.collective_shm import offered
from helexa.neuron.tp.leader import Group
from helexa.neuron.tp.partition import partition, thread_shares


def open_runner(
    spec: dict[str, Any], config: ModelConfig, progress: Callable[[float], None], on_failed: Callable[[str], None]
) -> Runner:
    """Loaded, and one step done. spec: the plan's. on_failed: told, once, of a rank's end, whether a step runs or not.
    Raises what load_shard and load_ranked do, and RuntimeError where the first step fails; nothing is left then."""
    socket = Path(spec["socket"])
    shards = shard_specs(spec, config)
    report = StepReport.create(report_of(socket))
    runner: Runner
    if len(shards) == 1:
        runner = LocalRunner(load_shard(shards[0], None, progress))
    else:
        backend = backend_of(spec["devices"], f"{platform.system()} {platform.machine()}")
        group = Group(backend, socket.parent, tuple(spec["device_indices"]))
        told = [msgspec.to_builtins(shard) for shard in shards]
        runner = load_ranked(told, group, progress=progress, started=report.ranks, on_failed=on_failed)
    watched = WatchedRunner(runner, report)
    try:
        # What is slow the first time, and what fails at once. Embedding models have no head.
        watched.step(Step([Row(0, 0, [0])], hidden=config.pooling is not None))
        watched.step(Step([], drops=[0]))
    except StepFailed as err:
        watched.close()
        raise RuntimeError(f"the first step failed: {err}") from err
    except MemoryError:
        watched.close()
        raise
    return watched


def shard_specs(spec: dict[str, Any], config: ModelConfig) -> list[ShardSpec]:
    """What each rank is told, by rank. The shares are computed here alone."""
    devices: list[str] = spec["devices"]
    shares = list(partition(config.shape, len(devices), spec["weights"]))
    threads = thread_shares(spec["threads"], len(devices))
    return [
        ShardSpec(spec["folder"], rank, len(devices), shares, spec["dtype"], device, threads[rank])
        for rank, device in enumerate(devices)
    ]


def backend_of(devices: list[str], place: str) -> str:
    """NCCL between GPUs; the ranks of one host's CPU share memory where that backend is offered. place: system and
    machine, as platform calls them."""
    if devices[0] != "cpu":
        return "nccl"
    return "shm" if offered(len(devices), place) else "gloo"
