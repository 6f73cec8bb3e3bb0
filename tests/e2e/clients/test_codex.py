"""Codex against a real gateway, node and engine: its shell writes and reads a file, and it goes on after errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.clients import npm_program, run_client
from tests.helpers.playing_gguf import Turn, call
from tests.helpers.stage import Stage, requests

CONFIG = """
model = "{model}"
model_provider = "helexa"
[model_providers.helexa]
name = "helexa"
base_url = "{url}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
[analytics]
enabled = false
"""

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def program() -> Path:
    return npm_program("@openai/codex-*/vendor/*/bin/codex")


def codex(program: Path, site: Stage, model: str, home: Path, prompt: str) -> list[dict[str, Any]]:
    """What it tells of its doing: one event a line."""
    (home / ".codex").mkdir()
    (home / ".codex" / "config.toml").write_text(CONFIG.format(model=model, url=site.url))
    command = [program, "exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "-"]
    ran = run_client(command, home, {}, stdin=prompt)
    said = [json.loads(line) for line in ran.out.splitlines()]
    assert said, ran
    return said


def test_it_writes_and_reads_a_file_and_goes_on_after_errors(program: Path, site: Stage, tmp_path: Path) -> None:
    model = site.play(
        "codex-coder",
        [
            Turn(
                "<think>\nIs there one?\n</think>\n\nI look first.\n"
                + call("exec_command", cmd="cat greeting.txt", login=False)
            ),
            Turn(call("multi_agent_v1__close_agent", target="nobody"), after="No such file"),
            Turn(call("exec_command", cmd="printf 'Grüße 😀' > greeting.txt", login=False), after="agent"),
            Turn(call("exec_command", cmd="cat greeting.txt", login=False), after="exited with code 0"),
            Turn("It says: Grüße 😀", after="Grüße 😀"),
        ],
    )
    said = codex(program, site, model, tmp_path, "Write a greeting.")
    items = [event["item"] for event in said if event["type"] == "item.completed"]
    assert said[-1]["type"] == "turn.completed", said
    assert (tmp_path / "work" / "greeting.txt").read_text() == "Grüße 😀"
    runs = [item["exit_code"] for item in items if item["type"] == "command_execution"]
    assert runs == [1, 0, 0]
    assert [item["text"].strip() for item in items if item["type"] == "reasoning"] == ["Is there one?"]
    assert items[-1]["text"] == "It says: Grüße 😀"
    last = requests(site, model, 5)[-1]
    assert last["cached_tokens"] > 0.9 * last["prompt_tokens"]
    assert said[-1]["usage"]["cached_input_tokens"] > 0
    assert [line["status"] for line in requests(site, model, 5)] == [200] * 5
