"""What is simulated: nodes with devices, models that are loaded on them, requests that run there.

Loads on a node run one after the other and take LOAD_S + size / rate; a model runs `slots` requests at once, each at
the model's own speed, and queues the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from helexa.core.lifecycle import ModelStatus
from helexa.cortex.eviction import Resident, Usage, min_residency_s
from helexa.cortex.plans import DeviceView, Need, NodeView, Wanted
from helexa.cortex.router import ModelRouter
from helexa.cortex.simulate.caches import Pool
from helexa.cortex.work import Work

LOAD_S: Final = 2.0
SLOTS: Final = 8
PREFILL: Final = 20_000.0  # tokens a second of a model of 1 GB; divided by the size
DECODE: Final = 1_000.0


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """devices_mb: what models may have of each device."""

    name: str
    devices_mb: Sequence[int]
    load_mb_s: float


@dataclass(frozen=True, slots=True)
class Model:
    """mb: what it takes in all, on however many devices. service_s: of every request, whatever its tokens; None: by
    its tokens and size. cache_tokens: of prompts, what a replica keeps; 0: every prompt is computed whole."""

    id: str
    mb: int
    slots: int = SLOTS
    pinned_on: Sequence[str] = ()
    min_devices: int = 1
    min_device_vram_mb: int = 0
    tensor_parallel: int = 1
    priority: int = 0
    ttl_s: float | None = None
    max_replicas: int | None = None
    service_s: float | None = None
    cache_tokens: int = 0

    def seconds(self, prompt_tokens: int, output_tokens: int) -> float:
        if self.service_s is not None:
            return self.service_s
        gb = self.mb / 1024
        return (prompt_tokens / PREFILL + output_tokens / DECODE) * gb

    def prefill_s(self, tokens: int) -> float:
        return tokens / PREFILL * self.mb / 1024

    def wanted(self) -> Wanted:
        return Wanted(
            self.id,
            Need((self.mb,), "measured"),
            pinned_on=self.pinned_on,
            min_devices=self.min_devices,
            min_device_vram_mb=self.min_device_vram_mb,
            tensor_parallel=self.tensor_parallel,
            priority=self.priority,
        )


class SimNode:
    """name and state are what the router looks at."""

    __slots__ = (
        "changed_at",
        "devices_mb",
        "free_mb",
        "load_mb_s",
        "loads_until",
        "mb_seconds",
        "name",
        "peak_mb",
        "promises",
        "replicas",
        "state",
        "view",
    )

    def __init__(self, spec: NodeSpec) -> None:
        self.name = spec.name
        self.state = "up"
        self.devices_mb = list(spec.devices_mb)
        self.free_mb = list(spec.devices_mb)
        self.promises: dict[str, dict[int, int]] = {}  # to planned loads, by model: MB by device
        self.load_mb_s = spec.load_mb_s
        self.loads_until = 0.0  # when its loads under way will all be done
        self.replicas: dict[str, SimReplica] = {}
        self.view: NodeView | None = None  # as it is now; None after a change
        self.mb_seconds, self.changed_at, self.peak_mb = 0.0, 0.0, 0

    @property
    def total_mb(self) -> int:
        return sum(self.devices_mb)

    def load_s(self, mb: int) -> float:
        return LOAD_S + mb / self.load_mb_s

    def take(self, memory_mb: dict[int, int], sign: int, now: float) -> None:
        """sign 1: taken; -1: given back."""
        used = self.total_mb - sum(self.free_mb)
        self.mb_seconds += used * (now - self.changed_at)
        self.changed_at = now
        for device, mb in memory_mb.items():
            self.free_mb[device] -= sign * mb
            assert 0 <= self.free_mb[device] <= self.devices_mb[device], "memory is never over-committed"
        self.peak_mb = max(self.peak_mb, self.total_mb - sum(self.free_mb))
        self.view = None

    def as_seen(self, now: float) -> NodeView:
        view = self.view
        if view is None:
            reserved = [sum(parts.get(i, 0) for parts in self.promises.values()) for i in range(len(self.devices_mb))]
            view = self.view = NodeView(
                name=self.name,
                devices=[
                    DeviceView(index=i, total_mb=total, free_mb=self.free_mb[i], reserved_mb=reserved[i])
                    for i, total in enumerate(self.devices_mb)
                ],
                residents=[replica.as_seen() for replica in self.replicas.values()],
                load_mb_s=self.load_mb_s,
                busy_s=max(0.0, self.loads_until - now),
            )
        return view


@dataclass(slots=True)
class SimModel:
    """live: the replicas that can be asked, which is the list that the router gets."""

    spec: Model
    wanted: Wanted
    live: list[SimReplica] = field(default_factory=list)
    loading: int = 0
    usage: Usage = field(default_factory=Usage)
    router: ModelRouter = field(default_factory=ModelRouter)


class SimReplica:
    """One model on one node, from the order to load it until its memory is free again. running, inflight: as counts;
    waiting: requests that the node queues, by number. node, inflight, others and work are what the router looks at."""

    __slots__ = (
        "cache",
        "inflight",
        "last_used",
        "load_s",
        "loaded_at",
        "memory_mb",
        "model",
        "node",
        "on_idle",
        "others",
        "running",
        "status",
        "waiting",
        "work",
    )

    def __init__(self, model: SimModel, node: SimNode, memory_mb: dict[int, int]) -> None:
        self.model = model
        self.node = node
        self.memory_mb = memory_mb
        self.status = ModelStatus.LOADING
        self.inflight = 0
        self.running = 0
        self.waiting: deque[int] = deque()
        self.load_s = self.loaded_at = self.last_used = 0.0
        self.others = 0
        self.work = Work()
        self.work.slots = model.spec.slots
        self.cache = Pool(model.spec.cache_tokens) if model.spec.cache_tokens else None
        self.on_idle: str | None = None  # the model that waits for this one to finish and go

    def as_seen(self) -> Resident:
        spec, usage = self.model.spec, self.model.usage
        return Resident(
            model=spec.id,
            memory_mb=self.memory_mb,
            state=self.status,
            in_use=self.running,
            queued=len(self.waiting),
            last_used=self.last_used,
            uses=usage.count,
            uses_at=usage.at,
            loaded_at=self.loaded_at,
            min_residency_s=min_residency_s(self.load_s),
            priority=spec.priority,
            copies=len(self.model.live),
            ttl_s=spec.ttl_s,
        )
