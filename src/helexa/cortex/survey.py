"""The fleet as a placement sees it: frozen views of nodes, made from the fleet's facts and from what this gateway
itself knows (what it has promised, what it is about to send, how much each model was asked for). No I/O.

A node's own figures are the truth about its memory, but they are as old as its last poll: what was ordered since then
is a promise, and counts until a poll that was sent after the order shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from math import ceil
from typing import Final

from helexa.core.catalogue import ModelProfile
from helexa.core.lifecycle import LoadRequest, ModelInfo, ModelStatus
from helexa.cortex.eviction import Resident, Usage, min_residency_s
from helexa.cortex.fleet import Fleet
from helexa.cortex.needs import Make, Needs
from helexa.cortex.nodes import Node, Replica
from helexa.cortex.plans import DeviceView, Need, NodeView, Plan, Wanted

_HOLDING: Final = frozenset(
    {ModelStatus.DOWNLOADING, ModelStatus.LOADING, ModelStatus.LOADED, ModelStatus.UNLOADING, ModelStatus.RECOVERING}
)
_NO_WISHES: Final = ModelProfile(id="")  # of a model that no catalogue names


@dataclass(slots=True)
class Promise:
    """Memory of a node for a load that this gateway has decided on. ordered_at: monotonic; None: not yet ordered."""

    parts_mb: Mapping[int, int]
    ordered_at: float | None = None


class Survey:
    """promises: by model and node. handed: requests that were told to go to a model and have not gone yet.

    Times are monotonic, which is the loop's clock.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.needs = Needs()
        self.promises: dict[tuple[str, str], Promise] = {}
        self.handed: Counter[str] = Counter()
        self._fleet = fleet
        self._specs: dict[str, tuple[ModelProfile | None, str]] = {}  # with the profile that it is of
        self._usage: dict[str, Usage] = {}
        self._counted: dict[tuple[str, str], int] = {}

    # what is asked

    def views(self, names: Iterable[str], now: float) -> list[NodeView]:
        """These nodes, as they are now; those that are still there."""
        self._fold_uses(now)
        self._forget_kept_promises()
        nodes = self._fleet.nodes
        return [self._node_view(nodes[name], now) for name in names if name in nodes]

    def wanted(self, model_id: str, nodes: Iterable[Node]) -> Wanted:
        """nodes: those that may hold it."""
        profile, spec = self._fleet.profiles.get(model_id), self.spec(model_id)
        need_on: dict[str, Need] = {}
        load_s: dict[str, float] = {}
        files_on: set[str] = set()
        for node in nodes:
            make = make_of(node)
            if (need := self.needs.on(spec, make)) is not None:
                need_on[node.name] = need
            if (seconds := self.needs.load_s(spec, make, node.name)) is not None:
                load_s[node.name] = seconds
            info = node.models.get(model_id)
            if info is not None and not (info.status == ModelStatus.UNLOADED and info.error):
                files_on.add(node.name)
        wishes = profile or _NO_WISHES
        return Wanted(
            model_id,
            self._general_need(profile, spec),
            need_on=need_on,
            load_s=load_s,
            files_on=frozenset(files_on) if files_on else None,
            devices=wishes.devices,
            shares=wishes.shares,
            min_devices=wishes.min_devices or 1,
            min_device_vram_mb=wishes.min_device_vram_mb or 0,
            tensor_parallel=wishes.tensor_parallel or 1,
            priority=wishes.residency_priority,
        )

    def spec(self, model_id: str) -> str:
        """The profile's hash, by which nodes tell what they have loaded."""
        profile = self._fleet.profiles.get(model_id)
        known, spec = self._specs.get(model_id, (None, ""))
        if not spec or known is not profile:
            spec = self.load_request(model_id, None).spec_hash()
            self._specs[model_id] = (profile, spec)
        return spec

    def load_request(self, model_id: str, node: Node | None) -> LoadRequest:
        """What a node is asked for: the whole profile; for what only disks know, the node's name for it."""
        profile = self._fleet.profiles.get(model_id)
        if profile is not None:
            return profile.load_request()
        listed = node.models.get(model_id) if node is not None else None
        return LoadRequest(model_id=listed.id if listed is not None else model_id)

    def may_fit_later(self, names: Iterable[str], priority: int, *, by_class: bool, now: float) -> list[NodeView]:
        """These nodes as they will be when all that may ever go has gone, and no promise is kept."""
        later = []
        for view in self.views(names, now):
            stays = [r for r in view.residents if r.pinned or (by_class and r.priority > priority)]
            devices = []
            for d in view.devices:
                goes = sum(r.memory_mb.get(d.index, 0) for r in view.residents if r not in stays)
                free = None if d.free_mb is None else d.free_mb + goes
                devices.append(
                    DeviceView(index=d.index, total_mb=d.total_mb, free_mb=free, strangers_mb=d.strangers_mb)
                )
            later.append(
                NodeView(name=view.name, devices=devices, residents=stays, state=view.state, on_cpu=view.on_cpu)
            )
        return later

    # what happened

    def promise(self, plan: Plan) -> None:
        parts = dict(zip(plan.devices, plan.parts_mb, strict=True))
        self.promises[plan.model, plan.node] = Promise(parts)

    def take_back(self, model_id: str) -> None:
        """What was promised for a load of this model that has not been ordered."""
        for key, promise in list(self.promises.items()):
            if key[0] == model_id and promise.ordered_at is None:
                del self.promises[key]

    def saw(self, model_id: str, node: Node, now: float) -> None:
        """What a loaded model holds is remembered, where it was loaded with our profile."""
        info = node.models.get(model_id)
        if info is None or info.status != ModelStatus.LOADED or info.spec_hash not in (None, self.spec(model_id)):
            return
        if info.memory:
            self.needs.took(self.spec(model_id), make_of(node), {m.device: m.used_mb for m in info.memory})

    # inside

    def _general_need(self, profile: ModelProfile | None, spec: str) -> Need | None:
        met = self.needs.anywhere(spec)
        if met is not None:
            return met
        return None if profile is None or profile.vram_mb is None else Need((profile.vram_mb,), "vram_mb")

    def _node_view(self, node: Node, now: float) -> NodeView:
        residents = [
            self._resident(node, model_id, info, now)
            for model_id, info in node.models.items()
            if info.parsed_status in _HOLDING or (info.parsed_status is None and info.vram_used_mb)
        ]
        found = node.discovery.devices if node.discovery is not None else []
        return NodeView(
            name=node.name,
            devices=self._devices(node, residents),
            residents=residents,
            state=node.state,
            on_cpu=bool(found) and all(device.kind == "cpu" for device in found),
        )

    def _devices(self, node: Node, residents: list[Resident]) -> list[DeviceView]:
        sizes = {d.index: d.vram_total_mb for d in node.discovery.devices} if node.discovery is not None else {}
        promised: Counter[int] = Counter()
        for (_, name), promise in self.promises.items():
            if name == node.name:
                promised.update(promise.parts_mb)
        views = []
        for device in node.health.devices if node.health is not None else ():
            free = device.vram_free_mb if device.error is None else None
            known = [mb for mb in (device.vram_limit_mb, sizes.get(device.index)) if mb is not None]
            if not known and free is not None and device.vram_used_mb is not None:
                known = [free + device.vram_used_mb]
            total = min(known) if known else None
            ours = sum(r.memory_mb.get(device.index, 0) for r in residents)
            strangers = max(0, total - free - ours) if total is not None and free is not None else 0
            views.append(
                DeviceView(
                    index=device.index,
                    total_mb=total,
                    free_mb=free,
                    reserved_mb=promised[device.index],
                    strangers_mb=strangers,
                )
            )
        return views

    def _resident(self, node: Node, model_id: str, info: ModelInfo, now: float) -> Resident:
        replica, profile = node.replicas.get(model_id), self._fleet.profiles.get(model_id)
        usage = self._usage.get(model_id, Usage())
        return Resident(
            model=model_id,
            memory_mb=self._memory(node, model_id, info),
            state=info.parsed_status or ModelStatus.LOADING,  # a word that we do not know: left alone
            in_use=(replica.inflight + replica.others if replica is not None else 0) + self.handed[model_id],
            pinned=profile is not None and node.name in profile.pinned_on,
            last_used=_last_used(replica, info, now),
            uses=usage.count,
            uses_at=usage.at,
            loaded_at=replica.loaded_at if replica is not None else 0.0,
            min_residency_s=min_residency_s(
                info.load_seconds or self.needs.load_s(self.spec(model_id), make_of(node), node.name)
            ),
            priority=profile.residency_priority if profile is not None else 0,
            copies=len(self._fleet.replicas(model_id)),
            ttl_s=profile.ttl_s if profile is not None else None,
        )

    def _memory(self, node: Node, model_id: str, info: ModelInfo) -> dict[int, int]:
        """By device: as told; else in all, on its devices alike; else what it took before or should."""
        if info.memory:
            return {m.device: m.used_mb for m in info.memory}
        used = info.vram_used_mb
        if used is None:
            need = self.needs.on(self.spec(model_id), make_of(node))
            profile = self._fleet.profiles.get(model_id)
            used = need.total_mb if need is not None else profile.vram_mb if profile is not None else None
        if not used:
            return {}
        devices = info.devices or [d.index for d in (node.health.devices if node.health is not None else ())][:1]
        return {device: used // len(devices) for device in devices}

    def _fold_uses(self, now: float) -> None:
        """Requests since the last look, into each model's decayed count."""
        for node in self._fleet.nodes.values():
            for model_id, replica in node.replicas.items():
                key = (model_id, node.name)
                new = replica.requests - self._counted.get(key, 0)
                if new:
                    self._counted[key] = replica.requests
                    before = self._usage.get(model_id, Usage())
                    self._usage[model_id] = Usage(before.at_time(now) + max(new, 0), now)

    def _forget_kept_promises(self) -> None:
        for key, promise in list(self.promises.items()):
            node = self._fleet.nodes.get(key[1])
            if node is None or (promise.ordered_at is not None and node.polled_at > promise.ordered_at):
                del self.promises[key]


def make_of(node: Node) -> Make:
    if node.discovery is None:
        return ((node.name, None),)
    return tuple((d.name, d.vram_total_mb) for d in node.discovery.devices)


def more_than(view: NodeView) -> int:
    """What a model needs at least that had not enough in the room there is; alone there, it may have all."""
    room, empty = sum(d.room_mb for d in view.devices), sum(d.empty_mb for d in view.devices)
    return min(room + 1, empty)


def _last_used(replica: Replica | None, info: ModelInfo, now: float) -> float:
    """By our own requests; else as the node tells, if its clock is not before ours; else since it was loaded."""
    if replica is not None and replica.last_used:
        return max(replica.last_used, replica.loaded_at)
    loaded_at = replica.loaded_at if replica is not None else 0.0
    if info.last_used is not None:
        try:
            told = datetime.fromisoformat(info.last_used.replace("Z", "+00:00"))
            age = ceil((datetime.now(told.tzinfo) - told).total_seconds())
        except (ValueError, OverflowError, TypeError):
            return loaded_at
        return max(loaded_at, now - max(0, age))
    return loaded_at
