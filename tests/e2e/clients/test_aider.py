"""aider against a real gateway, node and engine: it edits a file, and tries again when an edit does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.clients import CLIENTS, run_client
from tests.helpers.playing_gguf import Turn
from tests.helpers.stage import Stage, requests

AIDER = CLIENTS / "aider" / "bin" / "aider"
QUIET = ("--no-git", "--yes-always", "--no-check-update", "--analytics-disable", "--no-show-model-warnings")

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not AIDER.is_file(), reason=f"{AIDER} is not there: `make clients` brings it (700 MB)"),
]


def edit(old: str, new: str) -> str:
    return f"greeting.py\n```python\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE\n```\n"


def test_it_edits_a_file_and_tries_again_where_an_edit_does_not_fit(site: Stage, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    file = tmp_path / "work" / "greeting.py"
    file.write_text('print("Hallo 😀")\n')
    model = site.play(
        "aider",
        [
            Turn("Formal, then.\n\n" + edit('print("Hello")', 'print("Guten Tag")')),
            Turn("Ok."),  # which aider has it say without asking
            Turn(edit('print("Hallo 😀")', 'print("Grüß Gott 😀")'), after="exactly match"),
        ],
        aside=None,
        before=4,  # its examples of edits, and what it has itself say of the files
    )
    command = [AIDER, "--model", f"openai/{model}", "--edit-format", "diff", *QUIET]
    env = {"OPENAI_API_BASE": f"{site.url}/v1", "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    ran = run_client([*command, "--message", "Be formal.", "greeting.py"], tmp_path, env, timeout_s=120)
    assert ran.code == 0, ran
    assert file.read_text() == 'print("Grüß Gott 😀")\n', ran
    assert [line["status"] for line in requests(site, model, 2)] == [200] * 2
