"""Python libraries and the `llm` program against a real gateway, node and engine, from an environment of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers.clients import CLIENTS, run_client
from tests.helpers.stage import GREETING, Stage

PYTHON = CLIENTS / "python" / "bin"
SCRIPT = Path(__file__).parents[2] / "clients" / "libraries.py"
FUNCTIONS = """
from pathlib import Path

def read(path: str) -> str:
    return Path(path).read_text()

def write(path: str, content: str) -> str:
    Path(path).write_text(content)
    return "written"
"""

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not PYTHON.is_dir(), reason=f"{PYTHON} is not there: `make test` makes it"),
]


def test_langchain_and_pydantic_ai_call_tools_and_hand_their_results_and_errors_back(
    site: Stage, tmp_path: Path
) -> None:
    env = {"GATEWAY": site.url, "MODEL": site.play("libraries", GREETING)}
    ran = run_client([PYTHON / "python", SCRIPT], tmp_path, env)
    assert ran.code == 0, ran
    runs = {run.pop("client"): run for run in map(json.loads, ran.out.splitlines())}
    assert list(runs) == ["langchain-openai", "langchain-anthropic", "pydantic-ai-openai", "pydantic-ai-anthropic"]
    for name, run in runs.items():
        assert run.pop("cached") > 0, name
        assert run == {
            "text": "It says: Grüße 😀",
            "streamed": "It says: Grüße 😀" if name.startswith("langchain") else "A title",
            "calls": ["read", "write", "read"],
            "errors": 1,
            "file": "Grüße 😀",
        }, name


def test_llm_calls_tools_and_tells_what_came_of_it(site: Stage, tmp_path: Path) -> None:
    model = site.play("llm", GREETING)
    (tmp_path / "llm").mkdir()
    known = {"model_id": "mine", "model_name": model, "api_base": f"{site.url}/v1", "supports_tools": True}
    (tmp_path / "llm" / "extra-openai-models.yaml").write_text(json.dumps([known]))
    env = {"LLM_USER_PATH": str(tmp_path / "llm"), "OPENAI_API_KEY": "none"}
    ran = run_client([PYTHON / "llm", "-m", "mine", "--functions", FUNCTIONS, "Write a greeting."], tmp_path, env)
    assert ran.code == 0, ran
    assert ran.out.endswith("It says: Grüße 😀\n")
    assert (tmp_path / "work" / "greeting.txt").read_text() == "Grüße 😀"
