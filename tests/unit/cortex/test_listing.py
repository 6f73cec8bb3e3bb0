"""The entry of GET /v1/models, field by field as the contract shows it."""

from __future__ import annotations

from typing import Any

import pytest

from helexa.core.catalogue import ModelProfile
from helexa.core.lifecycle import ModelInfo, ModelLimits
from helexa.cortex.listing import Holding, entry


def made(*holdings: Holding, profile: ModelProfile | None = None, aliases: list[str] | None = None) -> dict[str, Any]:
    return entry("m", holdings, profile=profile, aliases=aliases or [], created=1764000000)


def on(node: str, status: str, state: str = "up", **fields: Any) -> Holding:
    return Holding(node, state, ModelInfo(id="m", status=status, **fields))


def test_the_entry_of_the_contract_is_what_two_nodes_and_the_catalogue_say() -> None:
    loaded = on(
        "beast",
        "loaded",
        limits=ModelLimits(context=32768, slots=4),
        n_ctx_train=40960,
        n_params=8190735360,
        size_bytes=5027783488,
        capabilities=["chat", "tools", "reasoning"],
        task="chat",
    )
    assert made(on("benjy", "unloaded"), loaded, aliases=["small"]) == {
        "id": "m",
        "object": "model",
        "created": 1764000000,
        "owned_by": "helexa",
        "status": {"value": "loaded"},
        "nodes": [{"name": "beast", "status": "loaded"}, {"name": "benjy", "status": "unloaded"}],
        "aliases": ["small"],
        "max_model_len": 32768,
        "meta": {"n_ctx": 32768, "n_ctx_train": 40960, "n_params": 8190735360, "size": 5027783488},
        "capabilities": ["chat", "tools", "reasoning"],
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
    }


def test_what_nobody_knows_is_absent_and_never_false_or_zero() -> None:
    assert made() == {
        "id": "m",
        "object": "model",
        "created": 1764000000,
        "owned_by": "helexa",
        "status": {"value": "unloaded"},
    }
    odd = made(on("a", "unloaded", n_params=0, size_bytes=0, capabilities=[], limits=ModelLimits(context=0)))
    assert odd.keys() - {"nodes"} == made().keys()


@pytest.mark.parametrize(
    ("statuses", "value"),
    [
        (["unloaded", "loaded", "failed"], "loaded"),
        (["loading", "recovering"], "recovering"),
        (["downloading", "loading"], "loading"),
        (["unloading", "unloaded"], "unloading"),
        (["failed", "unloaded"], "unloaded"),
        (["failed"], "failed"),
        (["melting"], "unloaded"),
        (["melting", "failed"], "failed"),
    ],
)
def test_the_status_is_the_one_nearest_to_an_answer(statuses: list[str], value: str) -> None:
    said = made(*(on(f"n{i}", s) for i, s in enumerate(statuses)))
    assert said["status"] == {"value": value}
    assert [n["status"] for n in said["nodes"]] == statuses


def test_a_node_that_is_down_is_listed_with_its_state_and_decides_nothing() -> None:
    said = made(on("a", "loaded", "down", n_params=7), on("b", "loading", "suspect"))
    assert said["status"] == {"value": "loading"}
    assert said["nodes"] == [
        {"name": "a", "status": "loaded", "state": "down"},
        {"name": "b", "status": "loading", "state": "suspect"},
    ]
    assert said["meta"] == {"n_params": 7}


def test_the_context_is_the_smallest_that_a_request_may_meet_then_the_wished_then_the_last_known() -> None:
    large, small = ModelLimits(context=4096), ModelLimits(context=2048)
    wished = ModelProfile(id="m", context=1024)
    both = made(on("a", "loaded", limits=large), on("b", "loaded", limits=small), profile=wished)
    assert both["max_model_len"] == 2048
    assert made(on("a", "unloaded", limits=large), profile=wished)["max_model_len"] == 1024
    assert made(on("a", "unloaded", limits=large))["max_model_len"] == 4096


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({"capabilities": ["chat", "vision"]}, (["text", "image"], ["text"])),
        ({"capabilities": ["embed"]}, (["text"], ["embeddings"])),
        ({"task": "rerank"}, (["text"], ["rerank"])),
        ({"task": "chat"}, (["text"], ["text"])),
    ],
)
def test_modalities_follow_from_what_the_model_can(
    fields: dict[str, Any], architecture: tuple[list[str], list[str]]
) -> None:
    inputs, outputs = architecture
    assert made(on("a", "loaded", **fields))["architecture"] == {
        "input_modalities": inputs,
        "output_modalities": outputs,
    }


def test_the_catalogue_tells_what_no_node_has_said_yet() -> None:
    profile = ModelProfile(id="m", task="embed", capabilities=["embed"], context=512, cost={"input": 0.1})
    said = made(profile=profile)
    assert said["capabilities"] == ["embed"]
    assert said["max_model_len"] == 512
    assert said["cost"] == {"input": 0.1}
    assert said["architecture"]["output_modalities"] == ["embeddings"]
