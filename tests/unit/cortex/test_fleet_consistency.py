"""Whatever nodes say in whatever order: the lists that requests read agree with what the nodes said last."""

from __future__ import annotations

import time

from hypothesis import assume
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.helpers.fleets import fleet, health, info

from helexa.core.catalogue import Catalogue, ModelProfile
from helexa.core.config import NeuronEntry
from helexa.core.lifecycle import ModelInfo, ModelStatus
from helexa.cortex.listing import entry, status_rank
from helexa.cortex.nodes import Node, Replica

NODES = ("a", "b")
CATALOGUE = (ModelProfile(id="small", source="org/repo:Q4"), ModelProfile(id="local", source="/srv/x.gguf"))
NAMES = ("small", "org/repo:Q4", "phi", "x", "local")
OTHERS = (ModelProfile(id="phi", source="org/repo:Q4"), ModelProfile(id="local", context=4096), ModelProfile(id="new"))
CATALOGUES = (CATALOGUE, OTHERS, ())
node_names = st.sampled_from(NODES)
STATUSES = ("loaded", "loading", "unloaded", "failed", "melting")
infos = st.builds(
    info,
    st.sampled_from(NAMES),
    st.sampled_from(STATUSES),
    source=st.sampled_from([None, "/srv/x.gguf"]),
    active_requests=st.sampled_from([None, 1]),
)


class AnyNews(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.catalogue = CATALOGUE
        self.view = fleet(*NODES, models=CATALOGUE)
        self.view.on_change.append(self.heard)
        self.running: list[Replica] = []
        self.said: dict[str, dict[str, ModelInfo]] = {name: {} for name in NODES}  # node's id -> its last word

    def node(self, name: str) -> Node:
        assume(name in self.view.nodes)
        return self.view.nodes[name]

    def heard(self, model_id: str | None) -> None:
        self.lists_agree()  # also in the middle of a change

    @rule(
        name=node_names,
        models=st.lists(infos, max_size=4, unique_by=lambda i: i.id),
        status=st.sampled_from(["ok", "draining"]),
    )
    def poll(self, name: str, models: list[ModelInfo], status: str) -> None:
        self.view.saw_poll(self.node(name), models=models, health=health(status), started=time.monotonic())
        self.said[name] = {i.id: i for i in models}

    @rule(name=node_names)
    def poll_that_is_older_than_all_events(self, name: str) -> None:
        node = self.node(name)
        self.view.saw_poll(node, models=[], health=health(), started=0.0)
        self.said[name] = {i: said for i, said in self.said[name].items() if i in node.touched}

    @rule(name=node_names)
    def miss(self, name: str) -> None:
        self.view.saw_miss(self.node(name), "late")

    @rule(name=node_names, model=infos)
    def event(self, name: str, model: ModelInfo) -> None:
        self.view.saw_model(self.node(name), model)
        self.said[name][model.id] = model

    @rule(name=node_names, model=st.sampled_from(NAMES), status=st.sampled_from(ModelStatus))
    def action(self, name: str, model: str, status: ModelStatus) -> None:
        self.view.mark(self.node(name), model, status)
        old = self.said[name].get(model)
        source, active = (old.source, old.active_requests) if old else (None, None)
        self.said[name][model] = info(model, status.value, source=source, active_requests=active)

    @rule(name=node_names, good=st.booleans())
    def request(self, name: str, good: bool) -> None:
        node = self.node(name)
        if good:
            self.view.request_succeeded(node)
        else:
            self.view.request_failed(node)

    @rule(name=node_names)
    def drain(self, name: str) -> None:
        self.view.saw_draining(self.node(name))

    @rule(catalogue=st.sampled_from(CATALOGUES), away=st.sampled_from([None, *NODES]), elsewhere=st.booleans())
    def reload(self, catalogue: tuple[ModelProfile, ...], away: str | None, elsewhere: bool) -> None:
        """Other models; and a node goes, or is at another address from now on. (It comes back with another reload.)"""
        before = dict(self.view.nodes)
        entries = [NeuronEntry(name=n, endpoint=f"http://{n}.invalid:13131") for n in NODES if n != away]
        if away is not None and elsewhere:
            entries.append(NeuronEntry(name=away, endpoint=f"http://{away}.invalid:2"))
        self.catalogue = catalogue
        self.view.reconfigure(entries, Catalogue(models=list(catalogue)))
        assert list(self.view.nodes) == [entry.name for entry in entries]
        for name, node in before.items():
            if self.view.nodes.get(name) is not node:
                self.said[name] = {}
                self.running = [replica for replica in self.running if replica.node is not node]
                self.view.saw_model(node, info("phi"))  # a late word of it
                self.view.mark(node, "phi", ModelStatus.LOADED)
                assert (node.state, node.models) == ("down", {})

    @rule(model=st.sampled_from(("small", "phi", "local", "x")))
    def begin(self, model: str) -> None:
        for replica in self.view.replicas(model)[:1]:
            replica.begin(1.0)
            self.running.append(replica)

    @rule()
    def end(self) -> None:
        if self.running:
            self.running.pop().end(2.0)

    @invariant()
    def lists_agree(self) -> None:
        for model_id in {m for n in self.view.nodes.values() for m in n.models} | {p.id for p in self.catalogue}:
            live = self.view.replicas(model_id)
            names = [r.node.name for r in live]
            assert len(names) == len(set(names))
            assert set(names) == {
                n.name
                for n in self.view.nodes.values()
                if n.state in ("up", "suspect") and model_id in n.models and n.models[model_id].status == "loaded"
            }
            assert all(r.info is r.node.models[model_id] and r.model_id == model_id for r in live)

    @invariant()
    def nothing_that_a_node_said_is_lost_or_made_up(self) -> None:
        for name, node in self.view.nodes.items():
            told = {raw: said for listings in node.by_name.values() for raw, said in listings.items()}
            assert told == self.said[name]
            assert set(node.filed) == set(told)
            for model_id, shown in node.models.items():
                assert status_rank(shown.status) == max(status_rank(i.status) for i in node.by_name[model_id].values())

    @invariant()
    def what_runs_is_counted(self) -> None:
        assert self.view.inflight == len(self.running)

    @invariant()
    def entries_are_never_stale(self) -> None:
        nodes = self.view.nodes.values()
        shown = {e["id"]: e for e in self.view.entries()}
        assert set(shown) == {m for n in nodes for m in n.models} | {p.id for p in self.catalogue}
        for model_id, made in shown.items():
            fresh = entry(
                model_id,
                [n.holding(model_id) for n in nodes if model_id in n.models],
                profile=self.view.profiles.get(model_id),
                aliases=[],
                created=made["created"],
            )
            assert made == fresh
            assert self.view.resolve(model_id) == model_id


TestAnyNews = AnyNews.TestCase
TestAnyNews.settings = hypothesis_settings(max_examples=80, stateful_step_count=30, deadline=None)
