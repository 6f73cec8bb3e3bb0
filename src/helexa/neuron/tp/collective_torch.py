"""Sums and gathers through torch.distributed: NCCL between GPUs, Gloo between CPU ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from helexa.neuron.tp.collective import CollectiveFailed
from helexa.neuron.tp.comm import Comm

LOOPBACK: Final = "lo" if sys.platform == "linux" else "lo0"


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
