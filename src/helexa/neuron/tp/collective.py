"""One interface for the sums and gathers of a tensor-parallel group. Nothing else knows which backend it is.

    nccl   CUDA devices, through torch.distributed (collective_torch.py)
    gloo   CPU, the same, bound to loopback
    shm    CPU ranks of one host: one mapping, spin then yield (collective_shm.py)

Every call is made by all ranks in the same order; a call returns, or raises CollectiveFailed on every rank that can
still run. Afterwards the group is good for nothing but `close`.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

TIMEOUT_S: Final = 120.0  # of the rendezvous, and of a rank that waits for another in a step


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
