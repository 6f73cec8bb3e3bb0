"""opencode against a real gateway, node and engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.clients import npm_program, run_client
from tests.helpers.playing_gguf import Turn, call
from tests.helpers.stage import Stage, requests

ENV = {
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
    "OPENCODE_DISABLE_SHARE": "1",
}

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def program() -> Path:
    return npm_program("opencode-linux-*/bin/opencode")


def opencode(program: Path, site: Stage, model: str, home: Path, prompt: str) -> list[dict[str, Any]]:
    """What it tells of its doing: one event a line."""
    options = {"baseURL": f"{site.url}/v1", "apiKey": "none"}
    described = {model: {"name": model, "tool_call": True, "limit": {"context": 24_576, "output": 8192}}}
    settings = {
        "provider": {"helexa": {"npm": "@ai-sdk/openai-compatible", "options": options, "models": described}},
        "model": f"helexa/{model}",
        "small_model": f"helexa/{model}",
        "permission": "allow",
        "autoupdate": False,
        "share": "disabled",
    }
    (home / "work").mkdir()
    (home / "work" / "opencode.json").write_text(json.dumps(settings))
    ran = run_client([program, "run", "--format", "json", prompt], home, ENV)
    said = [json.loads(line) for line in ran.out.splitlines()]
    assert said, ran
    return said


def test_it_reads_and_writes_a_file_and_goes_on_after_an_error(program: Path, site: Stage, tmp_path: Path) -> None:
    file = tmp_path / "work" / "greeting.txt"
    model = site.play(
        "opencode-coder",
        [
            Turn("<think>\nIs there one?\n</think>\n\nI look first.\n" + call("read", filePath=str(file))),
            Turn(call("write", content="Grüße 😀", filePath=str(file)), after="not found"),
            Turn(call("read", filePath=str(file)), after="rote"),
            Turn("It says: Grüße 😀", after="Grüße 😀"),
        ],
    )
    said = opencode(program, site, model, tmp_path, "Write a greeting.")
    assert file.read_text() == "Grüße 😀"
    parts = [event["part"] for event in said]
    assert [part["text"].strip() for part in parts if part["type"] == "text"] == ["I look first.", "It says: Grüße 😀"]
    assert [part["state"]["status"] for part in parts if part["type"] == "tool"] == ["error", "completed", "completed"]
    assert parts[-1]["tokens"]["cache"]["read"] > 0.9 * parts[-1]["tokens"]["total"]
    assert [line["status"] for line in requests(site, model, 5)] == [200] * 5
