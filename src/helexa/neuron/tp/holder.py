"""What a rank holds of a model, and what it does with it when it is told to. The engine stands behind two names: a
loader and the shard that it gives back; nothing of it is imported before a shard is loaded.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from helexa.neuron.tp import rpc
from helexa.neuron.tp.collective import Collective, CollectiveFailed

LOADER: Final = "helexa.neuron.harness.torch.ranks:load_rank"


class RankShard(Protocol):
    """One rank's part of a model."""

    kv_bytes_per_token: int

    def step(self, step: Any) -> Any:
        """Every rank computes the same step; its answer is rank 0's. A step without rows meets no other rank. Raises
        CollectiveFailed, RuntimeError, MemoryError."""

    def close(self) -> None: ...


Loader = Callable[[dict[str, Any], Collective | None, Callable[[float], None]], RankShard]


class CannotLoad(Exception):
    """str() is the reason."""


class NoShard(Exception):
    """Something was asked of a shard, and none is loaded."""


class Holder:
    """loader: "module:function", a Loader. Owned by one thread."""

    def __init__(self, loader: str = LOADER) -> None:
        self._loader = loader
        self._shard: RankShard | None = None
        self._read_step: Callable[[msgspec.Raw], Any]
        self._slabs: set[int] = set()

    def load(self, spec: dict[str, Any], collective: Collective | None) -> rpc.LoadShardOk:
        """Raises CannotLoad, CollectiveFailed, MemoryError."""
        if self._shard is not None:
            raise CannotLoad("a shard is loaded already; unload it first")
        from helexa.neuron.harness.torch.step import Step

        self._read_step = msgspec.json.Decoder(Step).decode
        loader = open_loader(self._loader)
        try:
            self._shard = loader(spec, collective, lambda _: None)
        except (CollectiveFailed, MemoryError):
            raise
        except Exception as err:
            raise CannotLoad(str(err) or repr(err)) from err
        return rpc.LoadShardOk(kv_bytes_per_token=self._shard.kv_bytes_per_token)

    def step(self, encoded: msgspec.Raw) -> rpc.StepOk:
        """HOT. Bench: bench/tp."""
        shard = self._loaded()
        step = self._read_step(encoded)
        self._slabs.difference_update(step.drops)
        self._slabs.update(copy.target for copy in step.copies)
        self._slabs.update(row.slab for row in step.rows)
        shard.step(step)
        return rpc.StepOk()

    def drop(self, slabs: list[int]) -> None:
        """Slabs that are not held are no error."""
        from helexa.neuron.harness.torch.step import Step

        shard = self._loaded()
        held = [slab for slab in slabs if slab in self._slabs]
        if held:
            self._slabs.difference_update(held)
            shard.step(Step(rows=[], drops=held))

    def clear(self) -> None:
        self.drop(sorted(self._slabs))

    def unload(self) -> None:
        shard, self._shard = self._shard, None
        self._slabs.clear()
        if shard is not None:
            shard.close()

    def memory(self) -> rpc.QueryMemoryOk:
        device_mb = None
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            device_mb = int(torch.cuda.memory_reserved()) >> 20
        return rpc.QueryMemoryOk(resident_mb=_resident_mb(), device_mb=device_mb)

    def _loaded(self) -> RankShard:
        if self._shard is None:
            raise NoShard
        return self._shard


def open_loader(name: str) -> Loader:
    """Raises CannotLoad."""
    module, _, function = name.partition(":")
    try:
        loader: Loader = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as err:
        raise CannotLoad(f"the loader {name} is not there: {err}") from err
    return loader


def _resident_mb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) >> 10
    return 0
