"""The Vercel AI SDK against a real gateway, node and engine: its providers for chat completions and for Messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.helpers.clients import CLIENTS, run_client
from tests.helpers.stage import GREETING, Stage

SCRIPT = Path(__file__).parents[2] / "clients" / "ai_sdk.mjs"

pytestmark = pytest.mark.timeout(120)


def test_tools_are_called_and_their_results_and_errors_go_back(site: Stage, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (CLIENTS / "node_modules" / "ai").is_dir():
        pytest.skip(f"node and the AI SDK below {CLIENTS} are wanted: `make test` installs it where there is npm")
    model = site.play("ai-sdk", GREETING)
    env = {"FOLDER": str(tmp_path), "GATEWAY": site.url, "MODEL": model}
    ran = run_client([node, "--input-type=module"], tmp_path, env, stdin=SCRIPT.read_text(), folder=CLIENTS)
    assert ran.code == 0, ran
    runs = [json.loads(line) for line in ran.out.splitlines()]
    assert [(run["dialect"], run["streamed"]) for run in runs] == [
        ("chat", False),
        ("chat", True),
        ("messages", False),
        ("messages", True),
    ]
    for run in runs:
        assert (run["text"], run["finish"]) == ("It says: Grüße 😀", "stop")
        assert run["reasoning"] == ["Is there one?"]
        assert (run["calls"], run["errors"]) == (["read", "write", "read"], 1)
        assert run["file"] == "Grüße 😀"
        assert run["usage"]["inputTokenDetails"]["cacheReadTokens"] > 0.5 * run["usage"]["inputTokens"]
