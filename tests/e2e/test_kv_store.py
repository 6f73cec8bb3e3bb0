"""A real model's prompt cache through a swap: the next turn of a conversation computes only what is new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.models import smollm2
from tests.helpers.neuron_daemon import Daemon, neuron

LONG = " ".join(f"Item {n} costs {n * 7 % 101} coins." for n in range(32))


def ask(daemon: Daemon, messages: list[dict[str, str]]) -> tuple[str, int, int]:
    """The answer, the tokens of the prompt, and how many of them were in the cache."""
    body: dict[str, Any] = {"model": "m", "messages": messages, "max_tokens": 6, "temperature": 0}
    answer = daemon.http.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.text
    said = answer.json()
    usage = said["usage"]
    return (
        said["choices"][0]["message"]["content"],
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
    )


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_the_next_turn_after_a_swap_finds_its_slot(tmp_path: Path, isolation: str) -> None:
    model = smollm2()
    with neuron(tmp_path, f'isolation = "{isolation}"\nspare_host = false') as daemon:

        def load() -> None:
            profile = {"model_id": "m", "source": str(model), "context": 1024, "slots": 2, "threads": 1}
            assert daemon.http.post("/models/load?wait=true", profile).status == 200

        load()
        talk = [{"role": "user", "content": f"Remember this. {LONG}"}]
        said, long, cached = ask(daemon, talk)
        assert cached == 0
        assert daemon.http.post("/models/unload", {"model_id": "m"}).status == 200
        [described] = (tmp_path / "cache" / "kv").glob("*.json")
        state = json.loads(described.read_text())
        assert state["tokens"] >= long
        assert len(state["blocks"]) == state["tokens"] // 256  # we read the engine's files as it writes them
        load()
        assert ask(daemon, [{"role": "user", "content": "Hello."}])[2] < 60  # a stranger leaves it alone
        talk += [{"role": "assistant", "content": said}, {"role": "user", "content": "What does item 3 cost?"}]
        _, _, cached = ask(daemon, talk)
        assert cached > long - 20
        metrics = daemon.http.get("/metrics").text
        assert "neuron_kv_restored_total 1.0" in metrics
        assert "neuron_kv_store_states 1.0" in metrics
    assert "Item 3" not in daemon.log
