"""What a gateway records is what `cortex simulate` plays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers.aio import run
from tests.helpers.fake_neuron import neurons
from tests.helpers.gateway import SETTINGS, asking, cortex
from tests.helpers.serving_neuron import ServingNeuron
from tests.integration.cortex_app.test_command_line import cortex_command

from helexa.cortex.simulate import trace

MODELS = '[[models]]\nid = "qwen"\nvram_mb = 5000\n[aliases]\nsmall = "qwen"\n'


def test_a_recorded_trace_is_played_by_the_simulator_and_has_no_word_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    settings = SETTINGS + f'[trace]\npath = "{path}"\n'
    node = ServingNeuron()
    secret = "the secret word is xyzzy " * 30

    async def main() -> None:
        async with neurons(node), cortex(tmp_path, {"beast": node.url}, toml=settings, models=MODELS) as gateway:
            await gateway.until_up("beast")
            messages = [{"role": "user", "content": secret}]
            assert (await gateway.chat("small", messages=messages)).status == 200
            messages += [{"role": "assistant", "content": "no"}, {"role": "user", "content": secret}]
            assert (await gateway.chat("qwen", messages=messages, stream=True)).status == 200
            assert (await gateway.post("/v1/messages", {**asking("qwen"), "max_tokens": 5})).status == 200
            assert (await gateway.chat("nobody")).status == 404
            await gateway.stop()

    run(main())
    recorded = trace.read(path)
    assert [(r.model, r.prompt_tokens, r.output_tokens) for r in recorded] == [("qwen", 7, 4)] * 3
    first, second, _ = (r.prefix for r in recorded)
    assert (len(first), len(second), second[0]) == (1, 2, first[0]), "the second goes on where the first ended"
    assert "xyzzy" not in path.read_text()
    played = cortex_command(
        "simulate", "--fleet", str(tmp_path / "cortex.toml"), "--node", "beast=8GB", "--trace", str(path),
        "--add-node", "24GB", "--json",
    )  # fmt: skip
    assert (played.code, played.err) == (0, "")
    rows = json.loads(played.out)
    assert [(row["name"], row["requests"], row["cold_starts"]) for row in rows] == [
        ("as it is", 3, 1),
        ("+ 24GB", 3, 1),
    ]


@pytest.mark.parametrize("path", ["/nowhere/trace.jsonl", "/dev"])
def test_a_trace_that_cannot_be_written_stops_the_start(tmp_path: Path, path: str) -> None:
    (tmp_path / "cortex.toml").write_text(SETTINGS + f'[trace]\npath = "{path}"\n')
    done = cortex_command("serve", "--config", str(tmp_path / "cortex.toml"))
    assert (done.code, f"[trace] path = {path} cannot be written" in done.err) == (2, True)
