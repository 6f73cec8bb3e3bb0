"""The ranks of one model as one Runner: rank 0 computes here, the others in processes of their own (neuron/tp).

A step is written to every rank, and then this side enters it; the ranks meet in the collectives inside. What goes
wrong with one rank ends all of them at once: a rank that waits in a collective cannot be asked to leave it.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from helexa.neuron.harness.torch.step import Step, StepFailed
from helexa.neuron.tp.collective import Collective, CollectiveFailed
from helexa.neuron.tp.holder import RankShard, open_loader
from helexa.neuron.tp.leader import Group, Leader
from helexa.neuron.tp.pool import PoolFailed
from helexa.neuron.tp.rank import CONSEQUENCE_S

LOAD_S: Final = 6 * 3600.0  # the daemon watches a load and ends one that stands still; this is for when it cannot

_encode = msgspec.json.Encoder().encode


class RankedRunner:
    """A Runner. One caller, one thread, but for `memory_mb` and `close`.

    A rank that ends while no step runs is told to `on_failed` as well: once, on a thread of the ranks, with the reason.
    From then on every step is StepFailed with that reason, and no rank is left, or none for long.
    """

    def __init__(self, leader: Leader, shard: RankShard, on_failed: Callable[[str], None]) -> None:
        self._leader = leader
        self._shard = shard
        self._failure: str | None = None
        self._told = threading.Event()
        self._on_failed = on_failed
        self._closing = False
        leader.tell_failure(self._failed)

    @property
    def pids(self) -> list[int]:
        """Of the other ranks."""
        return self._leader.pids

    @property
    def kv_bytes_per_token(self) -> int:
        """On this rank."""
        return self._shard.kv_bytes_per_token

    def step(self, step: Step) -> Any:
        """HOT. Bench: bench/tp."""
        if self._failure is not None:
            raise StepFailed(self._failure)
        self._leader.post_step(msgspec.Raw(_encode(step)))
        try:
            return self._shard.step(step)
        except Exception as err:
            raise StepFailed(self._end(err)) from err

    def memory_mb(self) -> list[int]:
        """Resident, of the other ranks, by rank. It waits for a step that runs. Raises StepFailed."""
        try:
            return [memory.resident_mb for memory in self._leader.memory()]
        except PoolFailed as err:
            raise StepFailed(str(err)) from err

    def close(self) -> None:
        """No rank is left when it returns."""
        self._closing = True
        self._leader.close()
        self._shard.close()

    def _end(self, err: Exception) -> str:
        """Why a step failed on this side, once every rank is being killed."""
        own = f"rank 0: {str(err) or repr(err)}".replace("rank 0: rank 0", "rank 0")
        # That a peer did not come is a consequence; the peer's own end says why.
        if not isinstance(err, CollectiveFailed) or not self._told.wait(2 * CONSEQUENCE_S):
            self._leader.fail(own)
            self._told.wait(2 * CONSEQUENCE_S)
        return self._failure or own

    def _failed(self, reason: str) -> None:
        self._failure = reason
        self._told.set()
        if not self._closing:
            self._on_failed(reason)


def load_ranked(
    specs: Sequence[dict[str, Any]],
    group: Group,
    *,
    progress: Callable[[float], None],
    on_failed: Callable[[str], None],
    started: Callable[[list[int]], None] = lambda pids: None,
) -> RankedRunner:
    """Start the ranks, bring them together, and load a model's parts on all of them at once.

    specs: by rank, this one's first, for the group's loader. started: told the other ranks' process ids. Raises
    PoolFailed, or MemoryError where a rank had too little; no rank is left then.
    """
    load = open_loader(group.loader)
    leader = Leader(group)
    try:
        started(leader.pids)
        shard = leader.load(lambda: load(specs[0], leader.collective, progress), specs, LOAD_S)
    except PoolFailed as err:
        leader.close()
        if err.out_of_memory:
            raise MemoryError(str(err)) from err
        raise
    except BaseException:
        leader.close()
        raise
    return RankedRunner(leader, shard, on_failed)


def load_rank(spec: dict[str, Any], collective: Collective | None, progress: Callable[[float], None]) -> RankShard:
    """The engine's loader, as every rank knows it."""
    module: Any = importlib.import_module("helexa.neuron.harness.torch.shard")
    shard: RankShard = module.load_shard(msgspec.convert(spec, module.ShardSpec), collective, progress)
    return shard
