"""One node, and one model loaded on it: the records of which the `Fleet` is the view, and the only one to change them
(but for `Replica.begin` and `end`, which are the request's)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal

from helexa.core.config import NeuronEntry
from helexa.core.discovery import Discovery, NodeHealth
from helexa.core.lifecycle import ModelInfo
from helexa.core.relay.upstream import Upstream
from helexa.cortex.listing import Holding
from helexa.cortex.work import Work

NodeState = Literal["up", "suspect", "down", "draining"]

LOAD_SILENCE_S: Final = 120.0  # how long a load may keep a node silent that has it in its own process
MISSES_UNTIL_DOWN: Final = 2
SLOTS: Final = 4  # of a model whose node does not tell
PACE_OVER: Final = 16  # requests: a few rounds of its slots, so that a change of load shows soon
_AT_LOAD: Final = frozenset({"loading", "recovering"})


class Replica:
    """One model loaded on one node. Lives as long as the node lists the model, so that counts outlast a reload.

    model_id is the gateway's; the node's own name for it, which a request must bear, is `info.id`.

    work:      what the router knows of its prompts and its speed
    requests:  how many it was given, ever
    others:    requests there that are not ours, when the node last told: another gateway's, or a person's
    loaded_at: monotonic, where we saw it become loaded; 0.0: it was before
    """

    __slots__ = (
        "_ends",
        "_idle_s",
        "inflight",
        "info",
        "last_used",
        "loaded_at",
        "model_id",
        "node",
        "others",
        "requests",
        "work",
    )

    def __init__(self, node: Node, model_id: str, info: ModelInfo) -> None:
        self.node = node
        self.model_id = model_id
        self.inflight = 0
        self.requests = 0
        self.others = 0
        self.loaded_at = 0.0
        self.last_used = 0.0  # monotonic; 0.0: not yet by us
        self._idle_s = 0.0  # how long none of ours was there, in all
        self._ends: deque[float] = deque(maxlen=PACE_OVER)  # of the last requests, idle time left out
        self.work = Work()
        self.told(info)

    def told(self, info: ModelInfo) -> None:
        """What the node says of it now."""
        self.info = info
        if info.limits is not None:
            self.work.of_size(info.limits.slots, info.limits.context)

    @property
    def slots(self) -> int:
        limits = self.info.limits
        return limits.slots if limits is not None and limits.slots else SLOTS

    @property
    def beyond_slots(self) -> int:
        """Requests that wait in the node's queue; negative: places that are free."""
        return self.inflight + self.others - self.slots

    def pace(self, now: float) -> float | None:
        """How many requests a second end there while it is at work; None where too few have ended to tell."""
        if len(self._ends) < 2:
            return None
        return len(self._ends) / max(now - self._idle_s - self._ends[0], 0.001)

    def begin(self, now: float) -> None:
        """HOT. A request goes there."""
        if not self.inflight:
            self._idle_s += now - self.last_used
        self.inflight += 1
        self.requests += 1
        self.last_used = now

    def end(self, now: float) -> None:
        """HOT. It is over: a long stream was no idle time."""
        self.inflight -= 1
        self.last_used = now
        self._ends.append(now - self._idle_s)
        if not self.inflight and self.node.on_idle is not None:
            self.node.on_idle()


class Node:
    """One neuron. models: by the gateway's ids, the nearest to an answer where two listings are one file.

    is_draining:  by its own word: it shuts down; is_set_aside: by the operator's, until he takes it back
    is_removed:   no longer one of the fleet's; requests that run there end in their time
    polled_at: monotonic time at which the last poll that it answered was sent
    on_idle:   called when the last of our requests to one of its models has ended
    """

    __slots__ = (
        "bounds",
        "by_name",
        "discovery",
        "endpoint",
        "entry",
        "filed",
        "health",
        "is_draining",
        "is_removed",
        "is_set_aside",
        "last_error",
        "misses",
        "models",
        "name",
        "on_idle",
        "polled_at",
        "replicas",
        "requests_failed",
        "since",
        "state",
        "touched",
        "upstream",
        "version",
    )

    def __init__(self, entry: NeuronEntry, upstream: Upstream, since: float) -> None:
        self.entry = entry
        self.name = entry.name
        self.endpoint = entry.endpoint
        self.bounds = entry.limits
        self.upstream = upstream
        self.state: NodeState = "down"
        self.since = since  # wall clock
        self.last_error: str | None = "not asked yet"
        self.misses = MISSES_UNTIL_DOWN
        self.requests_failed = False
        self.is_draining = False
        self.is_set_aside = False
        self.is_removed = False
        self.polled_at = 0.0
        self.on_idle: Callable[[], None] | None = None
        self.discovery: Discovery | None = None
        self.health: NodeHealth | None = None
        self.version: dict[str, Any] | None = None
        self.models: dict[str, ModelInfo] = {}
        self.replicas: dict[str, Replica] = {}
        self.by_name: dict[str, dict[str, ModelInfo]] = {}  # gateway's id -> node's id -> what the node said
        self.filed: dict[str, str] = {}  # node's id -> gateway's id
        self.touched: dict[str, float] = {}  # node's id -> monotonic time of the last event or action

    @property
    def free_mb(self) -> int | None:
        """Memory that devices without a fault have free; None where nothing is known."""
        known = [d.vram_free_mb for d in (self.health.devices if self.health else []) if d.vram_free_mb is not None]
        return sum(known) if known else None

    def holding(self, model_id: str) -> Holding:
        return Holding(self.name, self.state, self.models[model_id])


def loads_inside(node: Node) -> bool:
    """Is it about a load in its own process, during which it may be silent?"""
    if node.discovery is None or node.discovery.isolation != "none":
        return False
    recent = time.monotonic() - node.polled_at < LOAD_SILENCE_S
    return recent and any(info.status in _AT_LOAD for info in node.models.values())


def why_not_up(node: Node) -> str | None:
    if node.state == "draining" or (node.last_error is None and node.is_set_aside):
        return f"by the operator's word; `cortex resume {node.name}` takes it back" if node.is_set_aside else "it stops"
    return node.last_error
