"""What daemon and host process say to each other: orders down, events up, a line of JSON each."""

from __future__ import annotations

from typing import Any, Final

import msgspec


class Load(msgspec.Struct, tag_field="op", tag="load"):
    harness: str
    spec: dict[str, Any]


class Quit(msgspec.Struct, tag_field="op", tag="quit"):
    pass


Order = Load | Quit


class Ready(msgspec.Struct, tag_field="event", tag="ready"):
    """The harness and its engine are imported."""


class Progress(msgspec.Struct, tag_field="event", tag="progress"):
    fraction: float


class Loaded(msgspec.Struct, tag_field="event", tag="loaded"):
    """The engine answers on its socket."""


class Failed(msgspec.Struct, tag_field="event", tag="failed"):
    """The process ends after it. out_of_memory: the device or the host had no more."""

    error: str
    out_of_memory: bool = False


Event = Ready | Progress | Loaded | Failed

orders: Final = msgspec.json.Decoder[Order](Order)
events: Final = msgspec.json.Decoder[Event](Event)
_encode = msgspec.json.Encoder().encode


def line(message: Order | Event) -> bytes:
    return _encode(message) + b"\n"
