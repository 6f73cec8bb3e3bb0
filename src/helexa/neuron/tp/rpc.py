"""What the leader and its ranks say to each other: newline-delimited JSON, one request, exactly one response. Pure.

A frame is one line of at most MAX_FRAME bytes. A request may carry an `id`, which its response echoes. A rank answers
whatever it can read; what it cannot read has an `error` for an answer, and the rank lives on. Half a line at the end
of the stream was never sent whole, and is dropped.
"""

from __future__ import annotations

from typing import Any, Final, get_args

import msgspec

MAX_FRAME: Final = 16 << 20  # bytes, the line's end not counted


class Frame(msgspec.Struct, omit_defaults=True, kw_only=True, tag_field="op"):
    id: int | None = None


# requests


class Ping(Frame, tag="ping"):
    pass


class Init(Frame, tag="init"):
    """Enter the group. comm_id: opaque to this module; see comm.py."""

    comm_id: str


class NcclSanityCheck(Frame, tag="nccl_sanity_check"):
    """Sum a one of every rank, whatever the backend is called."""


class LoadShard(Frame, tag="load_shard"):
    """Load this rank's part of a model. spec: for the engine's loader, opaque to this module."""

    spec: dict[str, Any]


class Step(Frame, tag="step"):
    """Compute one step with every other rank. step: the engine's own, opaque to this module."""

    step: msgspec.Raw


class Drop(Frame, tag="drop"):
    """Forget the keys and values of these slabs."""

    slabs: list[int]


class Clear(Frame, tag="clear"):
    """Forget the keys and values of every slab."""


class QueryMemory(Frame, tag="query_memory"):
    pass


class Unload(Frame, tag="unload"):
    """Give the shard's memory back; the rank stays in its group. Without a shard it is done already."""


class Shutdown(Frame, tag="shutdown"):
    pass


# responses


class Pong(Frame, tag="pong"):
    rank: int
    world_size: int
    cuda_device: int  # the index that discovery gave, on CPU too


class InitOk(Frame, tag="init_ok"):
    pass


class NcclSanityResult(Frame, tag="nccl_sanity_result"):
    observed_sum: int


class LoadShardOk(Frame, tag="load_shard_ok"):
    kv_bytes_per_token: int  # on this rank


class StepOk(Frame, tag="step_ok"):
    pass


class DropOk(Frame, tag="drop_ok"):
    pass


class ClearOk(Frame, tag="clear_ok"):
    pass


class QueryMemoryOk(Frame, tag="query_memory_ok"):
    """MB of 2^20. device_mb: what this process holds of its device; absent on CPU."""

    resident_mb: int
    device_mb: int | None = None


class UnloadOk(Frame, tag="unload_ok"):
    pass


class Bye(Frame, tag="bye"):
    """The last frame of a rank."""


class Error(Frame, tag="error"):
    """kind: unknown_op | bad_request | not_initialised | collective_unavailable | device | load | internal"""

    kind: str
    message: str


Request = Ping | Init | NcclSanityCheck | LoadShard | Step | Drop | Clear | QueryMemory | Unload | Shutdown
Response = (
    Pong | InitOk | NcclSanityResult | LoadShardOk | StepOk | DropOk | ClearOk | QueryMemoryOk | UnloadOk | Bye | Error
)


class BadFrame(Exception):
    """A line that is no request of ours; `error` is its answer."""

    def __init__(self, kind: str, message: str, frame_id: int | None = None) -> None:
        super().__init__(message)
        self.error = Error(id=frame_id, kind=kind, message=message)


class _Head(msgspec.Struct):
    op: str
    id: int | None = None


_heads = msgspec.json.Decoder(_Head)
_requests = msgspec.json.Decoder[Request](Request)
_responses = msgspec.json.Decoder[Response](Response)
_encode = msgspec.json.Encoder().encode
_OPS: Final = frozenset(str(kind.__struct_config__.tag) for kind in get_args(Request))
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)


def line(frame: Request | Response) -> bytes:
    return _encode(frame) + b"\n"


def read_request(data: bytes) -> Request:
    """One line without its end. Raises BadFrame."""
    try:
        head = _heads.decode(data)
    except _UNREADABLE as err:
        raise BadFrame("bad_request", f"not a frame: {err}") from None
    if head.op not in _OPS:
        raise BadFrame("unknown_op", f'"{head.op}" is not known; known: {", ".join(sorted(_OPS))}', head.id)
    try:
        request: Request = _requests.decode(data)
    except _UNREADABLE as err:
        raise BadFrame("bad_request", f"{head.op}: {err}", head.id) from None
    return request


def read_response(data: bytes) -> Response:
    """One line without its end. Raises ValueError (msgspec's errors are some)."""
    response: Response = _responses.decode(data)
    return response


class Lines:
    """Bytes in, in any cut; whole lines out, without their ends. A line over the limit comes out as None, once, and
    is never held in memory."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._rest = bytearray()
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes | None]:
        out: list[bytes | None] = []
        *whole, rest = data.split(b"\n")
        for piece in whole:
            self._take(piece, out)
            if not self._skipping:
                out.append(bytes(self._rest))
            self._rest.clear()
            self._skipping = False
        self._take(rest, out)
        return out

    def _take(self, piece: bytes, out: list[bytes | None]) -> None:
        if self._skipping:
            return
        if len(self._rest) + len(piece) > self._limit:
            self._skipping = True
            self._rest.clear()
            out.append(None)
        else:
            self._rest += piece

    @property
    def half(self) -> bytes:
        """What came after the last end of a line."""
        return bytes(self._rest)
