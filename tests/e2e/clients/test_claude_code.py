"""Claude Code against a real gateway, node and engine: it writes a file, reads it, and goes on after an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.clients import npm_program, run_client
from tests.helpers.playing_gguf import Turn, call
from tests.helpers.stage import Stage, requests

QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
}

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def program() -> Path:
    return npm_program("@anthropic-ai/claude-code-*/claude")


def claude(program: Path, site: Stage, model: str, home: Path, prompt: str) -> list[dict[str, Any]]:
    """What it tells of its doing: one object a line, the last one the result."""
    command = [program, "-p", "--output-format", "stream-json", "--verbose"]
    gateway = {"ANTHROPIC_BASE_URL": site.url, "ANTHROPIC_API_KEY": "none", "ANTHROPIC_MODEL": model}
    ran = run_client([*command, "--allowedTools", "Write,Read,Edit"], home, QUIET | gateway, stdin=prompt)
    said = [json.loads(line) for line in ran.out.splitlines()]
    assert said, ran
    return said


def blocks(said: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    messages = [line["message"] for line in said if line["type"] in ("assistant", "user")]
    return [block for message in messages for block in message["content"] if block["type"] == kind]


def test_it_writes_a_file_reads_it_and_goes_on_after_an_error(program: Path, site: Stage, tmp_path: Path) -> None:
    file = tmp_path / "work" / "greeting.py"
    first = "<think>\nA greeting: Grüße.\n</think>\n\nI write it first.\n"
    model = site.play(
        "coder",
        [
            Turn(first + call("Write", file_path=str(file), content='print("Grüße 😀")\n')),
            Turn(call("Edit", file_path=str(file), old_string="Hello", new_string="Guten Tag"), after="created"),
            Turn(call("Read", file_path=str(file)), after="not found"),
            Turn(call("Edit", file_path=str(file), old_string="Grüße", new_string="Guten Tag"), after="Grüße 😀"),
            Turn("The file says *Guten Tag* now. 😀", after="updated"),
        ],
    )
    said = claude(program, site, model, tmp_path, "Write a greeting, then make it formal.")
    assert said[-1]["subtype"] == "success", said
    assert said[-1]["result"] == "The file says *Guten Tag* now. 😀"
    assert file.read_text() == 'print("Guten Tag 😀")\n'
    assert [result.get("is_error", False) for result in blocks(said, "tool_result")] == [False, True, False, False]
    assert [block["thinking"].strip() for block in blocks(said, "thinking")] == ["A greeting: Grüße."]
    # Its billing header changes with every request; the prompt that the node sees does not.
    last = requests(site, model, 5)[-1]
    assert last["cached_tokens"] > 0.9 * last["prompt_tokens"]
    assert [line["status"] for line in requests(site, model, 5)] == [200] * 5


def test_it_knows_the_words_for_a_prompt_that_is_too_long(program: Path, site: Stage, tmp_path: Path) -> None:
    model = site.play("small", [Turn("Never said.")], context=4096)
    said = claude(program, site, model, tmp_path, "Hello.")
    assert said[-1]["is_error"], said
    assert "Prompt is too long" in said[-1]["result"]
