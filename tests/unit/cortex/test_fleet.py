from __future__ import annotations

import time

import pytest
from tests.helpers.fleets import answers, fleet, health, info, settings

from helexa.core.catalogue import Catalogue, ModelProfile
from helexa.core.config import Bounds, NeuronEntry
from helexa.core.discovery import DeviceHealth, Discovery
from helexa.core.errors import ModelNotFound, NoNode
from helexa.core.lifecycle import ModelLimits, ModelStatus
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import LOAD_SILENCE_S

QWEN = ModelProfile(id="Qwen/Qwen3-8B", quant="Q4_K_M", context=8192)


def names(view: Fleet, model_id: str) -> list[str]:
    return sorted(r.node.name for r in view.replicas(model_id))


# states of a node


def test_a_node_is_suspect_after_one_miss_down_after_two_and_back_after_one_answer() -> None:
    view = fleet("beast")
    node = view.nodes["beast"]
    states = [node.state]
    answers(view, "beast", info("m"))
    states.append(node.state)
    for _ in range(3):
        view.saw_miss(node, "GET /models: no answer within 1 s")
        states.append(node.state)
    answers(view, "beast", info("m"))
    states.append(node.state)
    assert states == ["down", "up", "suspect", "down", "down", "up"]


def test_a_node_that_loads_inside_is_not_down_for_its_silence_but_not_for_ever_either() -> None:
    view = fleet("beast")
    node = answers(view, "beast", info("m", "loading"))
    view.saw_discovery(node, Discovery(hostname="h", os="Linux", kernel="6", isolation="none"), None)
    for _ in range(3):
        view.saw_miss(node, "late", is_silence=True)
        assert node.state == "suspect"
    node.polled_at -= LOAD_SILENCE_S
    for _ in range(2):
        view.saw_miss(node, "late", is_silence=True)
        assert view.nodes["beast"].state == "down"


def test_a_suspect_node_can_still_be_asked_and_a_down_one_cannot_but_its_models_stay_listed() -> None:
    view = fleet("beast")
    node = answers(view, "beast", info("m"))
    view.saw_miss(node, "late")
    assert names(view, "m") == ["beast"]
    view.saw_miss(node, "late")
    assert names(view, "m") == []
    assert view.entry("m")["nodes"] == [{"name": "beast", "status": "loaded", "state": "down"}]
    assert view.entry("m")["status"] == {"value": "unloaded"}
    assert view.resolve("m") == "m"


def test_a_failed_request_makes_a_node_suspect_asks_it_at_once_and_never_takes_it_down() -> None:
    view = fleet("beast")
    node = answers(view, "beast", info("m"))
    doubted: list[str] = []
    view.on_doubt.append(lambda n: doubted.append(n.name))
    for _ in range(5):
        view.request_failed(node, "connection reset")
    assert node.state == "suspect"
    assert node.last_error == "connection reset"
    assert doubted == ["beast"]


def test_an_answered_request_clears_the_suspicion() -> None:
    view = fleet("beast")
    node = answers(view, "beast", info("m"))
    view.saw_miss(node, "late")
    view.request_succeeded(node)
    assert node.state == "up"
    view.saw_miss(node, "late")
    assert node.state == "suspect"  # the count began anew


def test_a_request_that_a_down_node_still_answered_does_not_bring_it_back() -> None:
    view = fleet("beast")
    node = answers(view, "beast", info("m"))
    view.saw_miss(node, "late")
    view.saw_miss(node, "late")
    view.request_succeeded(node)
    assert node.state == "down"


@pytest.mark.parametrize("how", ["poll", "event"])
def test_a_draining_node_takes_nothing_new(how: str) -> None:
    view = fleet("beast")
    node = answers(view, "beast", info("m"))
    if how == "poll":
        answers(view, "beast", info("m"), status="draining")
    else:
        view.saw_draining(node)
    assert node.state == "draining"
    assert names(view, "m") == []
    assert view.holders("m") == []
    answers(view, "beast", info("m"))
    assert names(view, "m") == ["beast"]


def test_since_tells_when_the_state_began() -> None:
    now = [1_764_000_000.0]
    view = Fleet(settings("beast"), Catalogue(), wall=lambda: now[0])
    now[0] += 5
    answers(view, "beast")
    now[0] += 5
    answers(view, "beast")
    assert view.view()["nodes"][0]["since"] == "2025-11-24T16:00:05.000Z"


# what is routable


@pytest.mark.parametrize("status", [*ModelStatus, "Loaded", "warming_up", ""])
def test_only_loaded_is_routable_and_a_word_nobody_knows_is_not(status: str) -> None:
    view = fleet("beast")
    answers(view, "beast", info("m", status))
    assert names(view, "m") == (["beast"] if status == "loaded" else [])


def test_the_list_of_replicas_is_one_object_that_changes_with_the_facts() -> None:
    view = fleet("beast", "benjy", models=[ModelProfile(id="m")])
    live = view.replicas("m")
    assert live == []
    answers(view, "beast", info("m"))
    answers(view, "benjy", info("m", "loading"))
    assert [r.node.name for r in live] == ["beast"]
    view.saw_model(view.nodes["benjy"], info("m", "loaded"))
    assert [r.node.name for r in live] == ["beast", "benjy"]
    answers(view, "beast")
    assert [r.node.name for r in live] == ["benjy"]
    assert view.replicas("m") is live


def test_counts_in_flight_outlast_a_reload() -> None:
    view = fleet("beast")
    node = answers(view, "beast", info("m"))
    [replica] = view.replicas("m")
    replica.begin(1.0)
    view.mark(node, "m", ModelStatus.UNLOADING)
    assert names(view, "m") == []
    answers(view, "beast", info("m"))
    assert view.replicas("m") == [replica]
    assert view.inflight == 1
    replica.end(9.0)
    assert (view.inflight, replica.last_used) == (0, 9.0)


def test_a_replica_shows_what_the_node_said_last() -> None:
    view = fleet("beast")
    answers(view, "beast", info("m", limits=ModelLimits(context=1024)))
    [replica] = view.replicas("m")
    answers(view, "beast", info("m", limits=ModelLimits(context=2048)))
    assert replica.info.limits == ModelLimits(context=2048)


# facts change with the action that changed them


def test_an_action_of_ours_shows_at_once_and_an_older_poll_does_not_undo_it() -> None:
    view = fleet("beast")
    node = answers(view, "beast", info("m", "loaded"))
    started = time.monotonic()
    view.mark(node, "m", ModelStatus.UNLOADED)
    assert names(view, "m") == []
    view.saw_poll(node, models=[info("m", "loaded")], health=health(), started=started)
    assert names(view, "m") == []
    view.saw_poll(node, models=[info("m", "loaded")], health=health(), started=time.monotonic())
    assert names(view, "m") == ["beast"]


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("recovering", "recovering"),
        ("unloaded", "unloaded"),
        (None, "loading"),
        ("odd", "loading"),
        ("loaded", "loaded"),
    ],
)
def test_a_model_that_its_node_refuses_to_serve_is_not_asked_again_until_the_node_says_otherwise(
    state: str | None, status: str
) -> None:
    view = fleet("beast")
    node = answers(view, "beast", info("m", "loaded"))
    doubted: list[str] = []
    view.on_doubt.append(lambda n: doubted.append(n.name))
    view.model_refused(view.replicas("m")[0], state)
    assert node.models["m"].status == status
    assert names(view, "m") == (["beast"] if status == "loaded" else [])
    assert doubted == ["beast"]
    answers(view, "beast", info("m", "loaded"))
    assert names(view, "m") == ["beast"]


def test_an_event_that_came_while_the_answer_to_an_action_was_on_its_way_stands() -> None:
    view = fleet("beast")
    node = answers(view, "beast", info("m", "unloaded"))
    asked = time.monotonic()
    view.saw_model(node, info("m", "loaded"))
    view.mark(node, "m", ModelStatus.LOADING, asked=asked)
    assert names(view, "m") == ["beast"]


def test_a_model_first_heard_of_by_event_survives_an_older_listing_without_it() -> None:
    view = fleet("beast")
    node = answers(view, "beast")
    started = time.monotonic()
    view.saw_model(node, info("new", "loaded"))
    view.saw_poll(node, models=[], health=health(), started=started)
    assert names(view, "new") == ["beast"]
    view.saw_poll(node, models=[], health=health(), started=time.monotonic())
    assert names(view, "new") == []
    with pytest.raises(ModelNotFound):
        view.resolve("new")


def test_whoever_listens_hears_each_change_once_and_nothing_when_nothing_changed() -> None:
    view = fleet("beast")
    heard: list[str | None] = []
    view.on_change.append(heard.append)
    answers(view, "beast", info("m", "loading"))
    assert sorted(map(str, heard)) == ["None", "m"]
    heard.clear()
    answers(view, "beast", info("m", "loading"))
    assert heard == []
    answers(view, "beast", info("m", "loaded"))
    assert heard == ["m"]
    heard.clear()
    view.saw_miss(view.nodes["beast"], "late")
    assert sorted(map(str, heard)) == ["None", "m"]


def test_the_view_is_already_right_when_a_change_is_told() -> None:
    view = fleet("beast")
    seen: list[list[str]] = []
    view.on_change.append(lambda _: seen.append(names(view, "m")))
    answers(view, "beast", info("m"))
    assert seen
    assert all(s == ["beast"] for s in seen)


def test_a_device_event_changes_that_device_only() -> None:
    view = fleet("beast")
    node = answers(view, "beast", free_mb=1000)
    view.saw_device(node, DeviceHealth(index=1, vram_free_mb=500))
    view.saw_device(node, DeviceHealth(index=0, vram_free_mb=700))
    assert node.free_mb == 1200


def test_unknown_free_memory_is_unknown_and_not_zero() -> None:
    view = fleet("beast")
    assert view.nodes["beast"].free_mb is None
    assert answers(view, "beast", free_mb=None).free_mb is None


# names


def test_aliases_catalogue_loaded_and_on_disk_names_resolve() -> None:
    view = fleet("beast", models=[QWEN], aliases={"small": QWEN.id, "mine": "phi"})
    answers(view, "beast", info("phi", "unloaded"))
    assert view.resolve("small") == view.resolve(QWEN.id) == QWEN.id
    assert view.resolve("phi") == view.resolve("mine") == "phi"


def test_an_unknown_name_is_told_the_nearest_ones_and_never_goes_to_the_hub() -> None:
    view = fleet("beast", models=[QWEN], aliases={"small": QWEN.id})
    answers(view, "beast", info("phi-4", "unloaded"))
    with pytest.raises(ModelNotFound, match="'Qwen/Qwen3-8B'"):
        view.resolve("qwen/qwen3-8")
    with pytest.raises(ModelNotFound, match="'phi-4'"):
        view.resolve("phi4")
    with pytest.raises(ModelNotFound, match="GET /v1/models"):
        view.resolve("mistralai/Mistral-7B")


def test_an_alias_for_several_means_those_that_are_known_and_a_pattern_only_what_means_nothing_else() -> None:
    view = fleet("beast", models=[QWEN], aliases={"smart": ["gone", QWEN.id, "phi"], "*": "smart"})
    answers(view, "beast", info("phi", "unloaded"))
    assert view.candidates("smart") == view.candidates("gpt-4") == (QWEN.id, "phi")
    assert view.candidates("phi") == ("phi",)
    assert view.resolve("smart") == QWEN.id
    assert [entry["id"] for entry in view.entries()] == [QWEN.id, "phi"]
    assert view.entry("phi")["aliases"] == ["*", "smart"]


def test_an_alias_that_leads_nowhere_says_where_it_leads() -> None:
    view = fleet("beast", aliases={"smart": "gone/model"})
    answers(view, "beast")
    with pytest.raises(ModelNotFound, match="'smart' is an alias of 'gone/model'"):
        view.resolve("smart")


def test_an_absurdly_long_name_is_refused_shortly() -> None:
    view = fleet("beast", models=[QWEN])
    answers(view, "beast")
    with pytest.raises(ModelNotFound) as refused:
        view.resolve("x" * 1_000_000)
    assert len(refused.value.message) < 500


def test_with_no_node_alive_an_unknown_name_may_be_known_later_and_a_known_one_resolves() -> None:
    view = fleet("beast", models=[QWEN])
    assert view.resolve(QWEN.id) == QWEN.id
    with pytest.raises(NoNode, match="beast is down"):
        view.resolve("phi")
    with pytest.raises(NoNode, match="no node is configured"):
        fleet().resolve("phi")


# one file, one id


@pytest.mark.parametrize(
    ("profile", "node_name", "source"),
    [
        (ModelProfile(id="small", source="org/repo-GGUF:Q4_K_M"), "org/repo-GGUF:Q4_K_M", None),
        (ModelProfile(id="small", source="org/repo-GGUF", quant="Q4_K_M"), "org/repo-GGUF:Q4_K_M", None),
        (ModelProfile(id="org/repo", quant="q4_k_m"), "org/repo-GGUF:Q4_K_M", None),
        (ModelProfile(id="small", source="/srv/a.gguf"), "a", "/srv/a.gguf"),
    ],
)
def test_a_file_that_the_catalogue_names_is_one_model_under_the_catalogues_id(
    profile: ModelProfile, node_name: str, source: str | None
) -> None:
    view = fleet("beast", models=[profile])
    answers(view, "beast", info(node_name, "unloaded", source=source))
    assert [e["id"] for e in view.entries()] == [profile.id]
    assert view.resolve(node_name) == profile.id
    # loaded by us under the catalogue's id, the file is still listed beside it
    answers(view, "beast", info(node_name, "unloaded", source=source), info(profile.id, "loaded"))
    assert [e["id"] for e in view.entries()] == [profile.id]
    assert [r.info.id for r in view.replicas(profile.id)] == [profile.id]


def test_a_file_loaded_under_the_nodes_own_name_is_asked_for_by_that_name() -> None:
    view = fleet("beast", models=[ModelProfile(id="small", source="org/repo:Q8_0")])
    answers(view, "beast", info("org/repo:Q8_0", "loaded"))
    [replica] = view.replicas("small")
    assert (replica.model_id, replica.info.id) == ("small", "org/repo:Q8_0")


def test_a_file_that_two_profiles_serve_keeps_its_own_name() -> None:
    models = [ModelProfile(id=n, source="org/repo:Q8_0", context=c) for n, c in [("short", 512), ("long", 32768)]]
    view = fleet("beast", models=models)
    answers(view, "beast", info("org/repo:Q8_0", "unloaded"))
    assert view.resolve("org/repo:Q8_0") == "org/repo:Q8_0"


def test_a_source_that_is_told_late_moves_the_model_to_its_id() -> None:
    view = fleet("beast", models=[ModelProfile(id="small", source="/srv/a.gguf")])
    answers(view, "beast", info("a", "loaded"))
    assert names(view, "a") == ["beast"]
    answers(view, "beast", info("a", "loaded", source="/srv/a.gguf"))
    assert (names(view, "a"), names(view, "small")) == ([], ["beast"])
    assert [e["id"] for e in view.entries()] == ["small"]


# who could load


def test_holders_are_the_pinned_nodes_that_answer() -> None:
    view = fleet("a", "b", "c", models=[ModelProfile(id="m", pinned_on=["a", "b"])])
    answers(view, "a", info("m", "unloaded"))
    answers(view, "b")
    answers(view, "c", info("m", "unloaded"))
    assert [(n.name, i.status if i else None) for n, i in view.holders("m")] == [("a", "unloaded"), ("b", None)]
    view.saw_miss(view.nodes["a"], "late")
    view.saw_miss(view.nodes["a"], "late")
    assert [n.name for n, _ in view.holders("m")] == ["b"]


def test_holders_of_what_no_catalogue_names_are_the_nodes_that_have_it() -> None:
    view = fleet("a", "b")
    answers(view, "a", info("m", "unloaded"))
    answers(view, "b")
    assert [n.name for n, _ in view.holders("m")] == ["a"]


# what is shown


def test_entries_are_kept_until_something_changes() -> None:
    view = fleet("beast", models=[QWEN])
    first = view.entries()
    assert view.entries() is first
    answers(view, "beast", info("phi", "unloaded"))
    assert [e["id"] for e in view.entries()] == [QWEN.id, "phi"]
    assert view.entries()[0]["status"] == {"value": "unloaded"}


def test_the_view_shows_nodes_models_and_requests_and_no_token() -> None:
    view = fleet("beast", models=[QWEN])
    answers(view, "beast", info("phi", vram_used_mb=900))
    view.replicas("phi")[0].begin(0.0)
    shown = view.view()
    assert shown["inflight"] == 1
    assert [m["id"] for m in shown["models"]] == [QWEN.id, "phi"]
    [node] = shown["nodes"]
    assert (node["name"], node["state"], node["endpoint"]) == ("beast", "up", "http://beast.invalid:13131")
    assert node["models"] == [{"id": "phi", "status": "loaded", "vram_used_mb": 900, "inflight": 1}]
    assert "last_error" not in node


def test_a_node_with_other_limits_is_the_same_node() -> None:
    view = fleet("beast", models=[QWEN])
    node = answers(view, "beast", info(QWEN.id))
    [replica] = view.replicas(QWEN.id)
    entry = NeuronEntry(name="beast", endpoint=node.endpoint, limits=Bounds(running=2))
    assert view.reconfigure([entry], Catalogue(models=[QWEN])) == ["the limits of beast are others"]
    assert view.replicas(QWEN.id) == [replica]
    assert view.is_bounded(QWEN.id)
