"""What `cortex decisions` and `cortex plan` print, from answers as a gateway gives them."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from helexa.cortex.reports import decisions_table, plan_report


def shown(what: Any) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(what)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def decision(**fields: Any) -> dict[str, Any]:
    return {"seq": 1, "at": "2026-11-24T12:00:00.000Z", "by": "upkeep", "why": "because", **fields}


def test_an_eviction_says_for_whom_at_what_price_and_with_all_what_else_was_weighed() -> None:
    weighed = [
        {"node": "beast", "price": 0.3, "victims": ["old"], "seconds": 4.0},
        {"node": "benjy", "price": 0.0},
        {"node": "tiny", "reason": "is too small"},
    ]
    evict = decision(
        what="evict", model="old", node="beast", wanted="qwen", by="request", requests=["a", "b", "c"], waiting=9,
        price=0.3123, weighed=weighed, not_shown=4,
    )  # fmt: skip
    lines = shown(decisions_table([evict], everything=True)).splitlines()
    assert "evict  old    beast  qwen (a, b and 7 more)  0.312  because" in lines[1]
    assert [line.strip() for line in lines[2:]] == [
        "beast: price 0.3: without old, about 4 s",
        "benjy: has room",
        "tiny: is too small",
        "and 4 other nodes",
    ]
    assert "tiny" not in shown(decisions_table([evict]))


def test_what_repeats_says_how_often() -> None:
    text = shown(decisions_table([decision(what="timed_out", model="qwen", times=40)]))
    assert "timed out ×40  qwen" in text


def test_a_plan_names_the_node_the_devices_and_what_goes_first() -> None:
    load = {
        "node": "beast",
        "devices": [{"index": 0, "mb": 5000}, {"index": 1, "mb": 4000}],
        "left_mb": 200,
        "seconds": 12.4,
        "victims": [{"model": "old", "score": 0.25, "mb": 8000, "idle_s": 4000.0}],
    }
    text = shown(
        plan_report(
            {"model": "qwen", "action": "load", "node": "beast", "why": "it costs least", "load": load,
             "weighed": [{"node": "tiny", "reason": "is too small"}]}
        )
    )  # fmt: skip
    assert text.splitlines()[:5] == [
        "qwen would be loaded on beast",
        "  it costs least",
        "  beast: 5,000 MB on device 0 and 4,000 MB on device 1, 200 MB left over",
        "  goes first: old, 8,000 MB, idle for 4,000 s, score 0.25",
        "  the load takes about 12 s",
    ]
    assert "tiny  is too small" in text


def test_a_refusal_says_what_the_caller_would_get() -> None:
    error = {"status": 404, "code": "model_not_servable", "message": "no node can"}
    text = shown(plan_report({"model": "qwen", "action": "refuse", "why": "no node can", "error": error}))
    assert text.startswith("qwen would be refused with 404 model_not_servable\n  no node can")


def test_of_several_replicas_the_chosen_one_is_marked() -> None:
    replicas = [{"node": "a", "state": "up", "inflight": 2, "others": 1}, {"node": "b", "state": "up", "inflight": 0,
                "chosen": True}]  # fmt: skip
    text = shown(plan_report({"model": "q", "action": "serve", "node": "b", "why": "w", "replicas": replicas}))
    assert "q would be served on b" in text
    assert "b <   up     0" in text
    assert "a     up     2 and 1 of others" in text
