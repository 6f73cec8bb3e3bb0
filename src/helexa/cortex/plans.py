"""What a placement is asked and answers: the view of the fleet, a wanted model, a Plan or a NoPlan. Values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import msgspec

from helexa.cortex.eviction import Price, Resident

Source = Literal["measured", "estimate", "vram_mb"]
NodeState = Literal["up", "suspect", "down", "draining"]


# By what plans are compared: a suspect node and one that must fetch the file come last; then the price; then the room
# left over; then the name, so that the answer does not depend on the order of the nodes.
Order = tuple[bool, bool, Price, int, str]


# The view


class DeviceView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One device; MB of 2^20. total and free are None where the node does not tell: nothing is placed there.

    free_mb:      what the node says that a load may take now
    reserved_mb:  promised to loads that free_mb does not show yet; more than is free while their victims are there
    strangers_mb: held by processes that are no models of the node
    """

    index: int
    total_mb: int | None
    free_mb: int | None
    reserved_mb: int = 0
    strangers_mb: int = 0

    @property
    def room_mb(self) -> int:
        return max(0, (self.free_mb or 0) - self.reserved_mb)

    @property
    def empty_mb(self) -> int:
        """What it would have if every model were gone."""
        return max(0, (self.total_mb or 0) - self.strangers_mb)


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """One node. Made anew when something on it changes, not for each plan; Structs for the reason `Resident` gives.

    load_mb_s: how fast it loads, by what it loaded so far; busy_s: what its loads under way still take
    on_cpu:    its only device is its processor, whose memory any number of ranks share
    """

    name: str
    devices: Sequence[DeviceView]
    residents: Sequence[Resident] = ()
    state: NodeState = "up"
    load_mb_s: float | None = None
    busy_s: float = 0.0
    on_cpu: bool = False

    def ranks(self, wanted: Wanted) -> int:
        """On how many devices of this node it has to be split."""
        return 1 if self.on_cpu else wanted.tensor_parallel


@dataclass(frozen=True, slots=True)
class Split:
    """A need's parts, over all devices."""

    weights_mb: int
    kv_mb: int
    overhead_mb: int

    def __str__(self) -> str:
        return f"weights {self.weights_mb:,}, KV cache {self.kv_mb:,}, overhead {self.overhead_mb:,}"


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes, MB. One figure: in all, however many devices it is spread over. Several: by device, as it
    took them when it was spread over so many.

    split:  what it is made of, where a node's estimate said so
    ways:   what of the profile would make it fit, by what `told` (a node) said of itself
    """

    mb: tuple[int, ...]
    source: Source
    split: Split | None = None
    ways: tuple[str, ...] = ()
    told: str = ""

    @property
    def total_mb(self) -> int:
        return self.mb[0] if len(self.mb) == 1 else sum(self.mb)

    def __str__(self) -> str:
        return f"{self.total_mb:,} MB" + (f" ({self.split})" if self.split is not None else "")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model, and what its profile asks for.

    need:      what is known of it anywhere; need_on: by node, where it was loaded or estimated there. None: unknown
    load_s:    by node, what its load took there
    files_on:  the nodes that have its file; None: it does not matter. A node that would have to fetch it comes last
    avoid:     by node, why it is not to be tried now
    """

    model: str
    need: Need | None
    need_on: Mapping[str, Need] = field(default_factory=dict)
    load_s: Mapping[str, float] = field(default_factory=dict)
    files_on: frozenset[str] | None = None
    pinned_on: Sequence[str] = ()
    devices: Sequence[int] | None = None
    shares: Sequence[float] | None = None
    min_devices: int = 1
    min_device_vram_mb: int = 0
    tensor_parallel: int = 1
    priority: int = 0
    avoid: Mapping[str, str] = field(default_factory=dict)


# The answer


@dataclass(frozen=True, slots=True)
class Plan:
    """victims: models to unload there first, in this order. price: 0.0 where there are none. left_mb: room that is left
    on its devices. seconds: until it is loaded; None where nothing is known of that. weighed: nodes looked at closely.

    drains: victims that are in use and have to finish first; only where that was allowed.
    """

    model: str
    node: str
    devices: tuple[int, ...]
    parts_mb: tuple[int, ...]
    need: Need
    victims: tuple[str, ...]
    price: float
    left_mb: int
    order: Order
    seconds: float | None = None
    drains: tuple[str, ...] = ()
    weighed: int = 1


class Bar(Enum):
    """What stands against a node, the longest-lived first."""

    NEVER = "never"  # its size, or the profile
    PINNED = "pinned"  # it would fit if a pinned model went
    NOT_NOW = "not now"
    AWAY = "away"  # down, draining, or to be avoided for a while


class Reason(msgspec.Struct, frozen=True):
    """text: for a person, without the node's name. again_at: when that may be over; None: nobody knows. need: where
    memory is what is missing."""

    node: str
    bar: Bar
    text: str
    pins: tuple[str, ...] = ()
    again_at: float | None = None
    need: Need | None = None


class NoPlan:
    """No node can hold it; why, by node. Often only that matters, so the reasons may be given as what tells them: they
    are put into words when somebody looks."""

    __slots__ = ("_reasons", "model")

    def __init__(self, model: str, reasons: tuple[Reason, ...] | Callable[[], tuple[Reason, ...]]) -> None:
        self.model = model
        self._reasons = reasons

    @property
    def reasons(self) -> tuple[Reason, ...]:
        if not isinstance(self._reasons, tuple):
            self._reasons = self._reasons()
        return self._reasons

    @property
    def is_never(self) -> bool:
        """Waiting does not help: every node is too small, excluded, or held by pinned models."""
        return all(r.bar in (Bar.NEVER, Bar.PINNED) for r in self.reasons)

    @property
    def pins(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(pin for r in self.reasons for pin in r.pins))

    @property
    def again_at(self) -> float | None:
        return min((r.again_at for r in self.reasons if r.again_at is not None), default=None)

    def __str__(self) -> str:
        return "; ".join(f"{r.node}: {r.text}" for r in self.reasons) or "no node is configured"
