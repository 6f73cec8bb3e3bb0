"""How a rank enters its group: a backend's name picks the collective, and only this imports it."""

from __future__ import annotations

import threading

from helexa.neuron.tp.collective import TIMEOUT_S, Collective, CollectiveUnavailable
from helexa.neuron.tp.comm import Comm


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
    from helexa.neuron.tp.collective_torch import TorchCollective

    return TorchCollective(comm, rank, world_size, device, timeout_s=timeout_s)
