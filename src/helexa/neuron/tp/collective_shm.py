"""Sums between CPU ranks of one host through one mapping.

Layout: a page of counters (one cache line a rank, and one for the word that says that the group failed), then for each
rank two buffers, used by turns. A rank's line is the turn that it has published, and for each of the two buffers how
wide its part of a gather is. A rank writes its part into its buffer of this turn, publishes the turn's number, waits
until every rank has published it, and adds all parts in the order of the ranks, so that every rank gets the same bits.
Nobody may overwrite a buffer that is still being read: writing turn n + 2 comes after having waited for n + 1, which a
rank publishes only when it has read n.

The order "data, then counter" holds between processes where the machine keeps stores in order: x86. Elsewhere this
backend is not offered.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any, Final

from helexa.neuron.tp.collective import CollectiveFailed, CollectiveUnavailable
from helexa.neuron.tp.comm import Comm

LINE: Final = 8  # words of 8 bytes: a cache line
PAGE: Final = 4096
MOST_RANKS: Final = PAGE // (LINE * 8) - 1
PLACES: Final = ("Linux x86_64", "Linux AMD64")
BUFFER: Final = 1 << 20  # bytes a rank and turn; longer tensors go in pieces
SPINS: Final = 200  # looks before the core is given away; more gains nothing where ranks have cores of their own
LOOKS_A_CLOCK: Final = 64
YIELDING_S: Final = 0.002  # from then on it sleeps between looks: on a machine with other work, who spins takes the
SLEEP_S: Final = 0.00005  # core from whom it waits for, for a whole slice
VIEWS: Final = 64  # shapes whose tensors are kept; a model's decode has a few, prefill any number


def offered(world_size: int, place: str) -> bool:
    """place: system and machine, as `platform` calls them."""
    return place in PLACES and world_size <= MOST_RANKS


class ShmCollective:
    """Owned by one thread; `abort` may come from any."""

    def __init__(
        self,
        comm: Comm,
        rank: int,
        world_size: int,
        *,
        timeout_s: float,
        ended: threading.Event | None = None,
        buffer: int = BUFFER,
    ) -> None:
        if not offered(world_size, f"{platform.system()} {platform.machine()}"):
            raise CollectiveUnavailable(
                f"shm is for at most {MOST_RANKS} ranks, on Linux on x86 (this is {platform.system()} on "
                f"{platform.machine()}); use gloo"
            )
        import torch

        self._torch = torch
        self.rank, self.world_size = rank, world_size
        self._timeout_s = timeout_s
        self._ended = ended
        self._buffer = buffer
        self._turn = 0
        size = PAGE + world_size * 2 * buffer
        fd = _shared(comm.store, size, create=rank == 0, timeout_s=timeout_s)
        try:
            self._map = mmap.mmap(fd, size)
            self._words = memoryview(self._map).cast("q")
            self._views: dict[tuple[Any, int, int], list[Any]] = {}
            self.barrier()
        finally:
            os.close(fd)  # not before the others have found it
            if rank == 0:
                Path(comm.store).unlink(missing_ok=True)

    def all_reduce(self, tensor: Any) -> None:
        """HOT, twice a layer and step. Bench: bench/tp."""
        flat = tensor.view(-1)
        most = self._buffer // flat.element_size()
        for start in range(0, flat.numel(), most):
            self._sum(flat[start : start + most] if flat.numel() > most else flat)

    def _sum(self, piece: Any) -> None:
        views = self._parts(piece.dtype, piece.numel())
        views[self.rank].copy_(piece)
        self._meet()
        self._torch.add(views[0], views[1], out=piece) if self.world_size > 1 else piece.copy_(views[0])
        for view in views[2:]:
            piece.add_(view)

    def gather(self, tensor: Any) -> list[Any] | None:
        """HOT, once a step. Bench: bench/tp. On rank 0 its own part is the tensor itself."""
        rows = math.prod(tensor.shape[:-1])
        flat = tensor.contiguous().view(-1)
        most = self._buffer // flat.element_size()
        out: list[Any] = []
        start = longest = 0
        while start == 0 or start < longest:
            self._turn += 1
            which = self._turn % 2
            piece = flat[start : start + most]
            if self.rank and piece.numel():
                self._view(flat.dtype, piece.numel(), which)[self.rank].copy_(piece)
            self._words[self.rank * LINE + 1 + which] = tensor.shape[-1]
            self._meet()
            widths = [self._words[rank * LINE + 1 + which] for rank in range(self.world_size)]
            longest = rows * max(widths)
            if self.rank == 0:
                out = out or [tensor, *(tensor.new_empty((*tensor.shape[:-1], width)) for width in widths[1:])]
                for rank in range(1, self.world_size):
                    count = min(most, rows * widths[rank] - start)
                    if count > 0:
                        view = self._view(flat.dtype, count, which)[rank]
                        out[rank].view(-1)[start : start + count].copy_(view)
            start += most
        return out if self.rank == 0 else None

    def barrier(self) -> None:
        self._turn += 1
        self._meet()

    def count_ranks(self) -> int:
        one = self._torch.ones(1)
        self.all_reduce(one)
        return int(one.item())

    def abort(self) -> None:
        self._words[self.world_size * LINE] = 1

    def close(self) -> None:
        # The mapping goes with the last that looks into it: a thread that still waits here must find it.
        self._views.clear()

    def _parts(self, dtype: Any, count: int) -> list[Any]:
        """Every rank's buffer of the next turn, as tensors."""
        self._turn += 1
        return self._view(dtype, count, self._turn % 2)

    def _view(self, dtype: Any, count: int, which: int) -> list[Any]:
        key = (dtype, count, which)
        views = self._views.get(key)
        if views is None:
            if len(self._views) >= VIEWS:
                self._views.clear()
            views = self._views[key] = [
                self._torch.frombuffer(
                    self._map, dtype=dtype, count=count, offset=PAGE + (2 * rank + which) * self._buffer
                )
                for rank in range(self.world_size)
            ]
        return views

    def _meet(self) -> None:
        """Publish the turn, and wait for every rank to."""
        words, turn = self._words, self._turn
        words[self.rank * LINE] = turn
        failed = self.world_size * LINE
        began = 0.0
        patient = False
        for rank in range(self.world_size):
            looks = 0
            while words[rank * LINE] < turn:
                looks += 1
                if looks <= SPINS:
                    continue
                if patient:
                    time.sleep(SLEEP_S)
                else:
                    os.sched_yield()
                if looks % LOOKS_A_CLOCK:
                    continue
                now = time.monotonic()
                began = began or now
                patient = now > began + YIELDING_S
                deadline = began + self._timeout_s
                if words[failed] or now > deadline or (self._ended is not None and self._ended.is_set()):
                    words[failed] = 1
                    raise CollectiveFailed(f"rank {self.rank} waited for rank {rank}, which did not come")
        if words[failed]:
            raise CollectiveFailed(f"rank {self.rank}: the group was ended by another rank")


def _shared(path: str, size: int, *, create: bool, timeout_s: float) -> int:
    """A descriptor of the mapping. The leader's is memory and no file on a disk, to which pages would be written back,
    and which would outlive a leader that is killed; the others find it by a link to the leader's descriptor."""
    if create:
        fd = os.memfd_create("helexa-ranks", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        os.symlink(f"/proc/{os.getpid()}/fd/{fd}", path)
        return fd
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # it has not come yet, or is gone already
            if time.monotonic() > deadline:
                raise CollectiveFailed(f"the leader did not come within {timeout_s:g} s") from None
            time.sleep(0.001)
