"""The fleet as this gateway knows it: the nodes, what they hold, and which of it can be asked.

One owner: whatever changes the view is a method here, called on the loop, none of them blocks; readers get live
objects and do not write to them (but for `Replica.begin` and `end`). What a node says comes from the poller (`saw_*`),
what a request met from the relay (`request_*`), what the gateway did itself from the loader (`mark`): a fact changes
at once with the action that changed it, not with the next poll.

A node is asked at its configured endpoint, whatever it may say about itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec

from helexa import __version__
from helexa.core import logs
from helexa.core.catalogue import Catalogue, ModelProfile
from helexa.core.config import CortexSettings, NeuronEntry
from helexa.core.discovery import DeviceHealth, Discovery, NodeHealth
from helexa.core.errors import ModelNotFound, NoNode
from helexa.core.lifecycle import ModelInfo, ModelStatus
from helexa.core.relay.upstream import Upstream
from helexa.cortex.listing import entry, status_rank
from helexa.cortex.names import Names, closest
from helexa.cortex.node_view import node_view
from helexa.cortex.nodes import MISSES_UNTIL_DOWN, Node, NodeState, Replica, loads_inside, why_not_up

log = logs.get("cortex.fleet")

# What comes before loaded; a drain that ran out, back from unloading, is no new load.
_COMING: Final = frozenset({"unloaded", "downloading", "loading", "recovering", "failed"})
_LATEST: Final = ":latest"
NAME_SHOWN: Final = 200  # characters of an unknown name that an error repeats, and that are compared


class Fleet:
    """on_change: called after a change with the model's id, or None for a node's own; must not raise.
    on_doubt: called with a node whose last answer may not hold any more, so that it is asked at once."""

    def __init__(
        self, settings: CortexSettings, catalogue: Catalogue, *, wall: Callable[[], float] = time.time
    ) -> None:
        self._wall = wall
        self._connect_s = settings.timeouts.connect_s
        self._created = int(wall())
        self._names = Names(catalogue)
        self.nodes: dict[str, Node] = {n.name: self._new(n) for n in settings.neurons}
        self.on_change: list[Callable[[str | None], None]] = []
        self.on_doubt: list[Callable[[Node], None]] = []
        self._replicas: dict[str, list[Replica]] = {}
        self._where: dict[str, dict[str, Node]] = {}  # model id -> the nodes that list it, by name
        self._renamed: dict[str, str] = {}  # a node's name for a file -> the catalogue's id, where they differ
        self._entry: dict[str, dict[str, Any]] = {}
        self._entries: list[dict[str, Any]] | None = None

    # what it is made of

    def reconfigure(self, entries: Sequence[NeuronEntry], catalogue: Catalogue) -> list[str]:
        """Other nodes, other models. What a node that stays holds, and what runs there, is as before; one with another
        endpoint or token is another node. Returns what has changed, in words."""
        said: list[str] = []
        news: set[str] = set()
        kept: dict[str, Node] = {}
        wanted = {entry.name: entry for entry in entries}
        for node in list(self.nodes.values()):
            entry = wanted.get(node.name)
            if entry is not None and (entry.endpoint, entry.token) == (node.entry.endpoint, node.entry.token):
                kept[node.name] = node
                if entry != node.entry:
                    said.append(f"the limits of {node.name} are others")
                    node.entry, node.bounds = entry, entry.limits
                continue
            said.append(f"{node.name} is {'another node' if node.name in wanted else 'gone'}")
            news |= self._remove(node)
            if node.name in wanted:
                kept[node.name] = again = self._new(wanted[node.name])
                again.is_set_aside = node.is_set_aside
        said += [f"{name} is new" for name in wanted.keys() - kept.keys()]
        self.nodes.clear()
        self.nodes.update({name: kept.get(name) or self._new(entry) for name, entry in wanted.items()})
        before = self._names
        if catalogue != before.catalogue:
            self._names = Names(catalogue)
            said += _differences(before.catalogue, catalogue)
            news |= before.profiles.keys() | self.profiles.keys() | self._file_anew()
        if said:
            self._entry.clear()
            self._entries = None
            self._notify([*news, None])
        return said

    def _new(self, entry: NeuronEntry) -> Node:
        headers = {"authorization": f"Bearer {entry.token}"} if entry.token else None
        upstream = Upstream(entry.name, entry.endpoint, headers=headers, connect_s=self._connect_s)
        return Node(entry, upstream, self._wall())

    def _remove(self, node: Node) -> set[str]:
        node.state, node.since, node.last_error = "down", self._wall(), "it is no longer in cortex.toml"
        changed = {model_id for name in list(node.filed) for model_id in self._drop(node, name)}
        node.is_removed = True
        node.upstream.close()
        return changed

    def _file_anew(self) -> set[str]:
        """What nodes list, under the ids that it has now."""
        self._renamed.clear()
        changed: set[str] = set()
        for node in self.nodes.values():
            for name, model_id in list(node.filed.items()):
                info = node.by_name[model_id][name]
                now = self._names.of(info)
                if now != info.id:
                    self._renamed[info.id] = now
                if now != model_id:
                    changed |= self._drop(node, name) | self._put(node, info, told=False)
        for model_id in [m for m, live in self._replicas.items() if not live]:
            if model_id not in self._where and model_id not in self.profiles:
                del self._replicas[model_id]
        return changed

    # asking

    def is_as_configured(self, model_id: str, info: ModelInfo) -> bool:
        """Is a loaded model loaded with the profile that the catalogue has now? As far as that is known."""
        return info.spec_hash is None or self._names.spec_hash(model_id) in (None, info.spec_hash)

    @property
    def profiles(self) -> dict[str, ModelProfile]:
        """The catalogue by id."""
        return self._names.profiles

    def resolve(self, name: str) -> str:
        """The id that a name means; what an alias for several models means first. Raises as `candidates`."""
        return self.candidates(name)[0]

    def candidates(self, name: str) -> tuple[str, ...]:
        """The ids that a request's `model` may be served by, the preferred first; more than one only for an alias that
        lists several. Raises ModelNotFound with the nearest names, and NoNode where no node is alive that could say
        whether it knows the name.

        1. An alias. 2. A model by its own name. 3. A pattern, for names that mean nothing else. What nobody knows of
        several is left out.
        """
        aliases = self._names.aliases
        targets = aliases.exact.get(name)
        if targets is None:
            model_id = self._known(name)
            if model_id is not None:
                return (model_id,)
            if name.endswith(_LATEST):  # Ollama's clients write it where no tag was given; it is no quantisation
                return self.candidates(name.removesuffix(_LATEST))
            targets = aliases.match(name) or (name,)
        found = tuple(dict.fromkeys(known for target in targets if (known := self._known(target)) is not None))
        if not found:
            raise self._unknown(name, targets)
        return found

    def _known(self, name: str) -> str | None:
        """The id of a model that the catalogue or a node calls so."""
        if name in self._where or name in self._names.profiles:
            return name
        return self._renamed.get(name) or self._names.of_reference(name)

    def replicas(self, model_id: str) -> list[Replica]:
        """HOT. The live list: loaded, on nodes that are up or suspect; the same object until nobody knows the model.
        For an id that `resolve` gave; not to be changed."""
        live = self._replicas.get(model_id)
        return self._replicas.setdefault(model_id, []) if live is None else live

    def holders(self, model_id: str) -> list[tuple[Node, ModelInfo | None]]:
        """Nodes that could be asked to load it, with what they say about it: for a model of the catalogue those that
        `pinned_on` allows (a node may fetch the file), else those that have the file."""
        profile = self.profiles.get(model_id)
        if profile is None:
            nodes: Iterable[Node] = self._where.get(model_id, {}).values()
        else:
            nodes = [n for n in self.nodes.values() if not profile.pinned_on or n.name in profile.pinned_on]
        return [(node, node.models.get(model_id)) for node in nodes if node.state in ("up", "suspect")]

    def is_bounded(self, model_id: str) -> bool:
        """Has an operator bounded how many requests it, or a node that may hold it, may have?"""
        profile = self.profiles.get(model_id)
        own = profile is not None and profile.limits is not None
        return own or any(node.bounds is not None for node in self.nodes.values())

    def where(self, model_id: str) -> list[Node]:
        """Every node that lists the model, down ones too."""
        return list(self._where.get(model_id, {}).values())

    @property
    def is_alive(self) -> bool:
        return any(node.state != "down" for node in self.nodes.values())

    @property
    def inflight(self) -> int:
        return sum(replica.inflight for node in self.nodes.values() for replica in node.replicas.values())

    def entries(self) -> list[dict[str, Any]]:
        """GET /v1/models: the catalogue in its own order, then what else is on disks. Kept until something changes."""
        if self._entries is None:
            others = sorted(self._where.keys() - self.profiles.keys())
            self._entries = [self.entry(model_id) for model_id in [*self.profiles, *others]]
        return self._entries

    def entry(self, model_id: str) -> dict[str, Any]:
        """One of `entries`, for an id that `resolve` gave."""
        made = self._entry.get(model_id)
        if made is None:
            made = self._entry[model_id] = entry(
                model_id,
                [node.holding(model_id) for node in self._where.get(model_id, {}).values()],
                profile=self.profiles.get(model_id),
                aliases=self._names.aliases.leading_to(model_id),
                created=self._created,
            )
        return made

    def view(self) -> dict[str, Any]:
        """GET /fleet."""
        return {
            "nodes": [node_view(node, self.is_as_configured) for node in self.nodes.values()],
            "models": self.entries(),
            "inflight": self.inflight,
            "version": __version__,
        }

    # what the poller saw

    def saw_poll(self, node: Node, *, models: Iterable[ModelInfo], health: NodeHealth, started: float) -> None:
        """A whole answer to a poll that was sent at `started` (monotonic)."""
        node.health = health
        node.polled_at = started
        node.is_draining = health.status == "draining"
        changed = self._replace_models(node, models, started)
        node.misses, node.requests_failed, node.last_error = 0, False, None
        self._settle(node, changed)

    def saw_snapshot(self, node: Node, models: Iterable[ModelInfo], started: float) -> None:
        """The first event of a stream that was asked for at `started`. A node's state is the polls' to decide."""
        self._settle(node, self._replace_models(node, models, started))

    def saw_model(self, node: Node, info: ModelInfo) -> None:
        """A "model" event."""
        node.touched[info.id] = time.monotonic()
        self._settle(node, self._put(node, info))

    def saw_device(self, node: Node, device: DeviceHealth) -> None:
        """A "device" event."""
        if node.health is not None:
            others = [d for d in node.health.devices if d.index != device.index]
            node.health.devices = sorted([*others, device], key=lambda d: d.index)
            self._notify([None])

    def saw_draining(self, node: Node) -> None:
        """A "draining" event, or a request that was refused for it: it shuts down, and takes nothing new."""
        node.is_draining = True
        self._settle(node, set())

    def saw_discovery(self, node: Node, discovery: Discovery | None, version: dict[str, Any] | None) -> None:
        node.discovery, node.version = discovery, version
        self._notify([None])

    def saw_miss(self, node: Node, reason: str, *, is_silence: bool = False) -> None:
        """A poll without a whole, sensible answer. Its models stay listed. Silence of a node that loads in its own
        process is what such a load is like: it is suspect for that, and not down."""
        if is_silence and node.misses < MISSES_UNTIL_DOWN and loads_inside(node):
            node.misses = MISSES_UNTIL_DOWN - 1
        else:
            node.misses += 1
        node.last_error = reason
        self._settle(node, set())

    # what requests met, and what the gateway did

    def request_failed(self, node: Node, reason: str = "a request failed there") -> None:
        """A request found the node dead or stuck: used last until it has answered something."""
        was_up = node.state == "up"
        node.requests_failed = True
        node.last_error = reason
        self._settle(node, set())
        if was_up:
            self.doubt(node)

    def doubt(self, node: Node) -> None:
        """What the node last said may not hold any more: it is asked again at once."""
        for call in self.on_doubt:
            call(node)

    def request_succeeded(self, node: Node) -> None:
        """HOT, once per request. An answer is an answer, though a poll failed."""
        if node.state == "suspect":
            node.misses, node.requests_failed, node.last_error = 0, False, None
            self._settle(node, set())

    def model_refused(self, replica: Replica, state: str | None) -> None:
        """The node answered that it cannot serve the model now, being `state` (its `loading.state`): not asked again
        until it says otherwise, which it is asked at once."""
        status = ModelStatus.parse(state or "") or ModelStatus.LOADING
        if status is not ModelStatus.LOADED:
            self.mark(replica.node, replica.info.id, status)
        self.doubt(replica.node)

    def mark(
        self,
        node: Node,
        name: str,
        status: ModelStatus,
        *,
        error: str | None = None,
        asked: float | None = None,
        active: int | None = None,
    ) -> None:
        """What an action of ours did to the model that the node calls `name`. asked: when the action was sent; an
        event that came since then knows better and stands. active: requests that the node says run there."""
        if node.is_removed or (asked is not None and node.touched.get(name, 0.0) > asked):
            return
        node.touched[name] = time.monotonic()
        old = node.by_name.get(node.filed.get(name, ""), {}).get(name)
        if old is None:
            info = ModelInfo(id=name, status=status, error=error)
        else:
            info = msgspec.structs.replace(old, status=str(status), error=error, progress=None)
        changed = self._put(node, info, told=False)
        replica = node.replicas.get(node.filed[name])
        if replica is not None and active is not None:
            replica.others = max(0, active - replica.inflight)
        self._settle(node, changed)

    def set_aside(self, node: Node, aside: bool) -> None:
        """The operator's word: it gets no new requests and no loads, until he takes that back. What runs goes on."""
        node.is_set_aside = aside
        self._settle(node, set())

    def close(self) -> None:
        for node in self.nodes.values():
            node.upstream.close()

    # keeping the view

    def _replace_models(self, node: Node, models: Iterable[ModelInfo], started: float) -> set[str]:
        """A whole listing. What an event or an action of ours said after `started` is newer and stands."""
        changed: set[str] = set()
        newer = {name for name, at in node.touched.items() if at >= started}
        seen = set(newer)
        for info in models:
            seen.add(info.id)
            if info.id not in newer:
                changed |= self._put(node, info)
        for name in node.filed.keys() - seen:
            node.touched.pop(name, None)
            changed |= self._drop(node, name)
        return changed

    def _put(self, node: Node, info: ModelInfo, *, told: bool = True) -> set[str]:
        """told: by the node itself, just now."""
        if node.is_removed:
            return set()
        model_id = self._names.of(info)
        replica = node.replicas.get(model_id)
        if told and replica is not None:
            replica.others = max(0, (info.active_requests or 0) + (info.queued_requests or 0) - replica.inflight)
        changed: set[str] = set()
        if node.filed.get(info.id, model_id) != model_id:  # its source, and so its id, is known only now
            changed = self._drop(node, info.id)
        listings = node.by_name.setdefault(model_id, {})
        if listings.get(info.id) == info:
            return changed
        listings[info.id] = info
        node.filed[info.id] = model_id
        if info.id != model_id:
            self._renamed[info.id] = model_id
        self._refresh(node, model_id)
        return changed | {model_id}

    def _drop(self, node: Node, name: str) -> set[str]:
        model_id = node.filed.pop(name)
        listings = node.by_name[model_id]
        del listings[name]
        if not listings:
            del node.by_name[model_id]
        self._refresh(node, model_id)
        return {model_id}

    def _refresh(self, node: Node, model_id: str) -> None:
        """node.models, the replica and the live list after the node's listings of one model changed."""
        listings = node.by_name.get(model_id)
        if listings:
            info = max(listings.values(), key=lambda i: (status_rank(i.status), i.id == model_id))
            before = node.models.get(model_id)
            node.models[model_id] = info
            self._where.setdefault(model_id, {})[node.name] = node
            replica = node.replicas.get(model_id)
            if replica is not None:
                if info.status == ModelStatus.LOADED and replica.info.status in _COMING:
                    replica.loaded_at = time.monotonic()
                replica.told(info)
            elif info.status == ModelStatus.LOADED:
                node.replicas[model_id] = replica = Replica(node, model_id, info)
                replica.others = (info.active_requests or 0) + (info.queued_requests or 0)
                if before is not None and before.status in _COMING:
                    replica.loaded_at = time.monotonic()
        else:
            node.models.pop(model_id, None)
            nodes = self._where.get(model_id, {})
            nodes.pop(node.name, None)
            if not nodes:
                self._where.pop(model_id, None)
        self._relink(node, model_id)

    def _relink(self, node: Node, model_id: str) -> None:
        replica = node.replicas.get(model_id)
        if replica is None:
            return
        info = node.models.get(model_id)
        live = self._replicas.setdefault(model_id, [])
        routable = node.state in ("up", "suspect") and info is not None and info.status == ModelStatus.LOADED
        if routable and replica not in live:
            live.append(replica)
        elif not routable and replica in live:
            live.remove(replica)
        if info is None and replica.inflight == 0:
            del node.replicas[model_id]
            if model_id not in self._where and model_id not in self.profiles:
                del self._replicas[model_id]

    def _settle(self, node: Node, changed: set[str]) -> None:
        """The node's state from what is known, and the news of all that changed."""
        state: NodeState = "up"
        if node.is_removed or node.misses >= MISSES_UNTIL_DOWN:
            state = "down"
        elif node.is_draining or node.is_set_aside:
            state = "draining"
        elif node.misses or node.requests_failed:
            state = "suspect"
        news: list[str | None] = list(changed)
        if state != node.state:
            tell = log.warning if state in ("suspect", "down") else log.info
            tell(f"node is {state}", node=node.name, was=node.state, reason=why_not_up(node))
            node.state, node.since = state, self._wall()
            for model_id in list(node.replicas):
                self._relink(node, model_id)
            for model_id in node.models:
                self._entry.pop(model_id, None)
            news += [*(node.models.keys() - changed), None]
        if news:
            for model_id in changed:
                self._entry.pop(model_id, None)
            self._entries = None
            self._notify(news)

    def _notify(self, news: Iterable[str | None]) -> None:
        for model_id in news:
            for call in self.on_change:
                call(model_id)

    def _unknown(self, name: str, targets: Sequence[str]) -> ModelNotFound | NoNode:
        shown = name[:NAME_SHOWN]
        if not self.is_alive:
            return NoNode(
                f"no node is alive, and the catalogue does not name a model {shown!r}: "
                f"{self.why_no_node()} Check the nodes, or the name."
            )
        if targets[0] != name:
            what = " or ".join(map(repr, targets))
            return ModelNotFound(
                f"{shown!r} is an alias of {what}, which no node and no catalogue knows", param="model"
            )
        known = [*self._names.aliases.exact, *self.profiles, *(self._where.keys() - self.profiles.keys())]
        close = closest(shown, known)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "GET /v1/models lists what there is."
        return ModelNotFound(f"no model is called {shown!r}; {hint}", param="model")

    def why_no_node(self) -> str:
        """One sentence for an error: what is wrong with each node."""
        if not self.nodes:
            return "no node is configured ([[neurons]] in cortex.toml)."
        return (
            "; ".join(f"{n.name} is {n.state} ({why_not_up(n)})" for n in self.nodes.values() if n.state != "up") + "."
        )


def _differences(old: Catalogue, new: Catalogue) -> list[str]:
    before, after = ({m.id: m for m in catalogue.models} for catalogue in (old, new))
    said = [f"{model_id} is no longer named" for model_id in before.keys() - after.keys()]
    said += [f"{model_id} is new" for model_id in after.keys() - before.keys()]
    said += [f"{m} is described otherwise" for m in before.keys() & after.keys() if before[m] != after[m]]
    return sorted(said) + (["aliases"] if old.aliases != new.aliases else [])
