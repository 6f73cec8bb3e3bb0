"""Where the ranks of one model meet: the meaning of `comm_id`, which is opaque hex to everyone else. Pure."""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec

BACKENDS = ("nccl", "gloo", "shm")


class Comm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """backend: one of BACKENDS. store: a path in the model's private folder, new for each init, at which the ranks
    find each other (a FileStore of torch, or the mapping of shm itself)."""

    backend: str
    store: str
    nonce: str

    @classmethod
    def new(cls, backend: str, folder: Path) -> Comm:
        nonce = secrets.token_hex(8)
        return cls(backend, str(folder / f"comm-{nonce}"), nonce)

    @property
    def id(self) -> str:
        return msgspec.json.encode(self).hex()


def read(comm_id: str) -> Comm:
    """Raises ValueError for what no leader of ours wrote."""
    try:
        comm = msgspec.json.decode(bytes.fromhex(comm_id), type=Comm)
    except (ValueError, msgspec.MsgspecError) as err:
        raise ValueError(f"comm_id is not one of ours: {err}") from None
    if comm.backend not in BACKENDS:
        raise ValueError(f'comm_id names the backend "{comm.backend}"; known: {", ".join(BACKENDS)}')
    if not Path(comm.store).is_absolute():
        raise ValueError("comm_id names no absolute path")
    return comm
