"""What `cortex status` and `cortex models` print, from views as a gateway gives them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from helexa.cortex.status import age, bar, models_table, render

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


def shown(what: Any, width: int = 160) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(what)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def node(**fields: Any) -> dict[str, Any]:
    known = {"name": "beast", "endpoint": "http://beast:13131", "state": "up", "since": "2026-11-24T11:57:00.000Z"}
    return {**known, "models": [], **fields}


def view(*nodes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"nodes": list(nodes), "models": [], "inflight": 0, "version": "0.1.0", "warnings": [], **fields}


def test_a_nodes_devices_and_what_runs_on_them_are_shown() -> None:
    device = {"index": 0, "name": "RTX 3090", "vram_total_mb": 24576}
    health = {"index": 0, "vram_used_mb": 18432, "vram_free_mb": 6144, "utilization_pct": 43.0, "temp_c": 61.0}
    running = {"id": "m", "status": "loaded", "vram_used_mb": 2048, "active_requests": 2, "queued_requests": 1}
    text = shown(
        render(
            view(
                node(
                    discovery={"devices": [device]},
                    health={"devices": [health]},
                    version={"version": "0.1.0"},
                    models=[running, {"id": "asleep", "status": "unloaded"}],
                ),
                inflight=1,
            ),
            "http://gw:31313",
            NOW,
        )
    )
    assert "helexa cortex 0.1.0  http://gw:31313  1 request in flight" in text
    assert "beast  up for 3 min  http://beast:13131  neuron 0.1.0" in text
    assert "0  RTX 3090  [███████████████·····] 18.0 / 24.0 GB  43 %  61 °C" in text
    assert "m  loaded  2.0 GB  2 running, 1 queued" in text
    assert "asleep" not in text


def test_what_is_unknown_is_left_out_and_never_zero() -> None:
    text = shown(render(view(node(discovery={"devices": [{"index": 0, "name": "CPU"}]})), "u", NOW))
    assert "0  CPU" in text
    assert "GB" not in text
    assert "%" not in text


def test_a_dead_node_says_why_and_a_loading_model_how_far_it_is() -> None:
    loading = {"id": "m", "status": "loading", "progress": {"phase": "loading", "fraction": 0.43}}
    text = shown(
        render(
            view(node(state="down", last_error="connection refused"), node(name="benjy", models=[loading])), "u", NOW
        )
    )
    assert "beast  down for 3 min" in text
    assert "connection refused" in text
    assert "loading: 43 %" in text


def test_warnings_are_said() -> None:
    text = shown(render(view(warnings=["Everyone can use it."]), "u", NOW))
    assert "! Everyone can use it." in text


def test_models_are_listed_with_nodes_context_and_what_they_can() -> None:
    entry = {
        "id": "Qwen/Qwen3-8B", "status": {"value": "loaded"}, "max_model_len": 32768, "aliases": ["small"],
        "capabilities": ["chat", "tools"],
        "nodes": [{"name": "beast", "status": "loaded"}, {"name": "benjy", "status": "loaded", "state": "down"}],
    }  # fmt: skip
    text = shown(models_table([entry, {"id": "bare", "status": {"value": "unloaded"}}]))
    assert "Qwen/Qwen3-8B  loaded    beast benjy (down)   32,768  chat, tools  small" in text
    assert "bare           unloaded" in text


def test_a_long_id_is_never_cut_and_an_error_has_a_line_of_its_own() -> None:
    long = "owner/" + "a-name-with-a-long-tail-" * 3 + "GGUF:Q4_K_M"
    failed = {"id": long, "status": "failed", "error": "the file is not whole"}
    listed = {"id": long, "status": {"value": "failed"}, "nodes": [{"name": "beast", "status": "failed"}]}
    text = shown(render(view(node(models=[failed]), models=[listed]), "u", NOW), width=80)
    assert "…" not in text
    assert "GGUF:Q4_K_M: the file is not whole" in "".join(line.strip() for line in text.splitlines())


def test_without_nodes_it_says_where_they_are_named() -> None:
    assert "[[neurons]]" in shown(render(view(), "u", NOW))


@pytest.mark.parametrize(
    ("used", "total", "full"), [(0, 100, 0), (50, 100, 10), (100, 100, 20), (130, 100, 20), (5, 0, 0)]
)
def test_a_bar_never_leaves_its_brackets(used: float, total: float, full: int) -> None:
    assert bar(used, total).plain == "[" + "█" * full + "·" * (20 - full) + "]"


@pytest.mark.parametrize(
    ("since", "words"),
    [
        ("2026-11-24T11:59:58Z", "2 s"),
        ("2026-11-24T11:00:00Z", "1 h"),
        ("2026-11-20T12:00:00+00:00", "4 d"),
        ("2026-11-24T12:00:05Z", "0 s"),  # its clock is ahead of ours
    ],
)
def test_ages_are_told_in_one_unit(since: str, words: str) -> None:
    assert age(since, NOW) == words
