"""A shard in small, for ranks in tests: no weights, but real collectives, and it fails as it is told to.

Its answer is a row for each wanted token, [vocabulary]: column c is the sum over all ranks of (rank + 1) * the ids of
the row's tokens, plus c. The columns are dealt out to the ranks, and gathered.

spec: {"rank", "world_size", "vocabulary", "troubles": [{"rank", "step", "do"}]}; a trouble comes in the step of this
number (0 is the first; "load" while loading): die | raise | oom | hang | print | leave (ends with exit code 0)
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from helexa.neuron.harness.torch.step import Step
from helexa.neuron.tp.collective import Collective

LOADER = "tests.helpers.toy_shard:load"


def load(spec: dict[str, Any], collective: Collective | None, progress: Callable[[float], None]) -> ToyShard:
    shard = ToyShard(spec, collective)
    progress(0.5)
    shard.trouble("load")
    return shard


class ToyShard:
    kv_bytes_per_token = 8

    def __init__(self, spec: dict[str, Any], collective: Collective | None) -> None:
        self._spec = spec
        self._rank: int = spec["rank"]
        self._collective = collective
        self._steps = 0
        self.held: dict[int, int] = {}  # tokens by slab

    def step(self, step: Step) -> Any:
        self.trouble(self._steps)
        self._steps += 1
        for slab in step.drops:
            del self.held[slab]
        for copy in step.copies:
            self.held[copy.target] = copy.tokens
        for row in step.rows:
            assert self.held.get(row.slab, 0) >= row.start
            self.held[row.slab] = row.start + len(row.tokens)
        if not step.rows:
            return None
        wanted = [row for row in step.rows if row.wanted]
        sums = torch.tensor([[float(sum(row.tokens) * (self._rank + 1))] for row in wanted]).view(-1, 1)
        columns = [c for c in range(self._spec["vocabulary"]) if c % self._spec["world_size"] == self._rank]
        part = torch.tensor([[float(c) for c in columns]] * len(wanted)).view(len(wanted), len(columns))
        if self._collective is None:
            return part + sums
        self._collective.all_reduce(sums)
        gathered = self._collective.gather(part + sums)
        if gathered is None:
            return None
        out = torch.empty(len(wanted), self._spec["vocabulary"])
        for rank, piece in enumerate(gathered):
            out[:, rank :: self._spec["world_size"]] = piece
        return out

    def close(self) -> None:
        self.held.clear()

    def trouble(self, moment: int | str) -> None:
        for trouble in self._spec.get("troubles", []):
            if trouble["rank"] == self._rank and trouble["step"] == moment:
                _DO[trouble["do"]]()


def _raise() -> None:
    raise RuntimeError("the device is on fire")


def _oom() -> None:
    raise MemoryError("4 MiB wanted")


def _print() -> None:
    print("a print")
    libc = ctypes.CDLL(None)
    libc.printf(b"a C printf\n")
    libc.fflush(None)
    os.write(1, b'{"op":"step_ok","id":1}\n')


def _hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


_DO: dict[str, Callable[[], None]] = {
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "leave": lambda: sys.exit(0),
    "raise": _raise,
    "oom": _oom,
    "hang": _hang,
    "print": _print,
}
