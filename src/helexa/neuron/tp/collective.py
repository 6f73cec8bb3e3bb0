"""One interface for the sums and gathers of a tensor-parallel group. Nothing else knows which backend it is.

    nccl   CUDA devices, through torch.distributed
    gloo   CPU, through torch.distributed, bound to loopback
    shm    CPU ranks of one host: one mapping, spin then yield (collective_shm.py)

Every call is made by all ranks in the same order; a call returns, or raises CollectiveFailed on every rank that can
still run. Afterwards the group is good for nothing but `close`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, Protocol

from helexa.neuron.tp.comm import Comm

TIMEOUT_S: Final = 120.0  # of the rendezvous, and of a rank that waits for another in a step
LOOPBACK: Final = "lo" if sys.platform == "linux" else "lo0"


class CollectiveFailed(Exception):
    """A rank is gone, or did not come in time. str() is the reason."""


class CollectiveUnavailable(Exception):
    """This backend cannot run here. str() says why, and the way out."""


class Collective(Protocol):
    rank: int
    world_size: int

    def all_reduce(self, tensor: Any) -> None:
        """Sum over the ranks, in place. tensor: contiguous, the same shape and dtype on every rank."""

    def gather(self, tensor: Any) -> list[Any] | None:
        """Every rank's tensor, by rank, on rank 0; None on the others. Shapes may differ in the last dimension."""

    def barrier(self) -> None: ...

    def count_ranks(self) -> int:
        """The sum of a one of every rank, through the device: `world_size`, or the group is broken."""

    def abort(self) -> None:
        """From any thread: whoever waits, on any rank, fails now, where the backend can do that."""

    def close(self) -> None:
        """Never raises, never waits for a peer."""


def open_collective(
    comm: Comm,
    rank: int,
    world_size: int,
    device: int,
    *,
    timeout_s: float = TIMEOUT_S,
    ended: threading.Event | None = None,
) -> Collective:
    """Enter the group: returns when every rank has. device: this rank's, by discovery's index; CPU ranks have no use
    for it. ended: once it is set, whoever waits here gives up, where the backend can. Raises CollectiveUnavailable,
    CollectiveFailed."""
    try:
        import torch
    except ImportError as err:
        raise CollectiveUnavailable(f"torch is not installed here: pip install 'helexa[torch]' ({err})") from err
    if comm.backend == "shm":
        from helexa.neuron.tp.collective_shm import ShmCollective

        return ShmCollective(comm, rank, world_size, timeout_s=timeout_s, ended=ended)
    if comm.backend == "nccl" and not torch.cuda.is_available():
        raise CollectiveUnavailable("nccl needs CUDA devices, and torch sees none; use gloo or shm")
    return TorchCollective(comm, rank, world_size, device, timeout_s=timeout_s)


class TorchCollective:
    """nccl or gloo, met through a FileStore in the model's private folder. The back end is used as it is, not as the
    process's default group: that would be one for a process, with a count of groups that a failed rendezvous leaves
    behind."""

    def __init__(self, comm: Comm, rank: int, world_size: int, device: int, *, timeout_s: float) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.world_size = rank, world_size
        self._torch = torch
        self._device = torch.device("cuda", device) if comm.backend == "nccl" else torch.device("cpu")
        timeout = timedelta(seconds=timeout_s)
        try:
            store = dist.FileStore(comm.store, world_size)
            store.set_timeout(timeout)
            if comm.backend == "nccl":
                torch.cuda.set_device(self._device)
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group = dist.ProcessGroupNCCL(store, rank, world_size, options)
            else:
                # Gloo would bind to what the host's name resolves to, which may be a public address, or nothing.
                options = dist.ProcessGroupGloo._Options()
                options._devices = [dist.ProcessGroupGloo.create_device(interface=LOOPBACK)]
                options._timeout = timeout
                self._group = dist.ProcessGroupGloo(store, rank, world_size, options)
            self.barrier()
        except (RuntimeError, ValueError) as err:
            raise CollectiveFailed(f"rank {rank} could not enter the group over {comm.backend}: {err}") from err

    def all_reduce(self, tensor: Any) -> None:
        self._wait(lambda: self._group.allreduce(tensor))

    def gather(self, tensor: Any) -> list[Any] | None:
        size = self._torch.tensor([tensor.shape[-1]], device=tensor.device)
        sizes = [self._torch.zeros_like(size) for _ in range(self.world_size)]
        self._wait(lambda: self._group.allgather([sizes], [size]))
        widths = [int(n) for n in sizes]
        # Gloo and NCCL gather equal shapes only.
        padded = tensor.new_zeros((*tensor.shape[:-1], max(widths)))
        padded[..., : tensor.shape[-1]] = tensor
        into = [self._torch.empty_like(padded) for _ in range(self.world_size)] if self.rank == 0 else []
        self._wait(lambda: self._group.gather(into, padded, 0))
        return [part[..., :n] for part, n in zip(into, widths, strict=True)] if self.rank == 0 else None

    def barrier(self) -> None:
        self.count_ranks()

    def count_ranks(self) -> int:
        one = self._torch.ones(1, device=self._device)
        self.all_reduce(one)
        return int(one.item())

    def abort(self) -> None:
        """NCCL's kernels end; whoever waits in Gloo is woken only by the end of the other processes."""
        try:
            self._group.abort()
        except RuntimeError:
            pass

    def close(self) -> None:
        try:
            self._group.shutdown()
        except Exception:
            pass

    def _wait(self, call: Callable[[], Any]) -> None:
        try:
            call().wait()
        except RuntimeError as err:
            raise CollectiveFailed(f"rank {self.rank}: {err}") from err
