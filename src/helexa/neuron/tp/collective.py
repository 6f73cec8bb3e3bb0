"""One interface for the sums and gathers of a tensor-parallel group. Nothing else knows which backend it is.

    nccl   CUDA devices, through torch.distributed
    gloo   CPU, through torch.distributed, bound to loopback
    shm    CPU ranks of one host: one mapping, spin then yield (collective_shm.py)

Every call is made by all ranks in the same order; a call returns, or raises CollectiveFailed on every rank that can
still run. Afterwards the group is good for nothing but `close`.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import Any, Protocol

from helexa.neuron.tp.comm import Comm


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
    timeout_s: float = 60.0,
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
    """nccl or gloo through torch.distributed, over a FileStore in the model's private folder."""

    def __init__(self, comm: Comm, rank: int, world_size: int, device: int, *, timeout_s: float) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.world_size = rank, world_size
        self._dist = dist
        self._device = torch.device("cuda", device) if comm.backend == "nccl" else torch.device("cpu")
        if comm.backend == "nccl":
            torch.cuda.set_device(self._device)
        # Gloo binds to what the host's name resolves to, which may be a public address, or nothing.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            store = dist.FileStore(comm.store, world_size)
            dist.init_process_group(
                comm.backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
            )
            self.barrier()
        except (RuntimeError, ValueError) as err:
            raise CollectiveFailed(f"rank {rank} could not enter the group over {comm.backend}: {err}") from err

    def all_reduce(self, tensor: Any) -> None:
        self._do(lambda: self._dist.all_reduce(tensor))

    def gather(self, tensor: Any) -> list[Any] | None:
        import torch

        size = torch.tensor([tensor.shape[-1]], device=tensor.device)
        sizes = [torch.zeros_like(size) for _ in range(self.world_size)]
        self._do(lambda: self._dist.all_gather(sizes, size))
        widest = max(int(s) for s in sizes)
        # Gloo and NCCL gather equal shapes only.
        padded = tensor.new_zeros((*tensor.shape[:-1], widest))
        padded[..., : tensor.shape[-1]] = tensor
        into = [torch.empty_like(padded) for _ in range(self.world_size)] if self.rank == 0 else None
        self._do(lambda: self._dist.gather(padded, into))
        if into is None:
            return None
        return [part[..., : int(n)] for part, n in zip(into, sizes, strict=True)]

    def barrier(self) -> None:
        self._do(self._dist.barrier)

    def count_ranks(self) -> int:
        import torch

        one = torch.ones(1, device=self._device)
        self.all_reduce(one)
        return int(one.item())

    def abort(self) -> None:
        pass  # torch cannot wake a thread that waits in Gloo; a leader ends the processes

    def close(self) -> None:
        try:
            self._dist.destroy_process_group()
        except Exception:
            pass

    def _do(self, call: Any) -> None:
        try:
            call()
        except RuntimeError as err:
            raise CollectiveFailed(f"rank {self.rank}: {err}") from err
