"""The `neuron` program as a person calls it: results on stdout, all else on stderr, and the exit code."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.fake_hub import BreakOff, FakeHub
from tests.helpers.kv_states import put
from tests.helpers.neuron_daemon import neuron
from tests.helpers.scripted import write_model

from helexa import __version__
from helexa.neuron.kv.store import KvStore

MODEL = b"GGUF" + bytes(range(256)) * 4000  # by its beginning; no engine is asked to load it
Result = subprocess.CompletedProcess[str]


class Cli:
    """A folder of its own: models below models/, the download cache below hf/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = folder / "models"
        self.models.mkdir()
        self.config = folder / "cli.toml"
        self.config.write_text(f'models_dir = "{self.models}"\nport = 1\n')
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NEURON_", "HF_"))}
        self.env = {**clean, "HF_HOME": str(folder / "hf"), "CACHE_DIRECTORY": str(folder / "cache"), "COLUMNS": "200"}

    def __call__(self, *args: str, config: bool = True) -> Result:
        command = [sys.executable, "-m", "helexa.neuron", *args]
        if config:
            command += ["--config", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=self.env)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub().running() as it:
        yield it


def test_help_comes_at_once(cli: Cli) -> None:
    took = []
    for _ in range(5):
        start = time.perf_counter()
        result = cli("--help", config=False)
        took.append(time.perf_counter() - start)
        assert result.returncode == 0
        commands = [line.split()[0] for line in result.stdout.split("Commands:")[1].splitlines() if line.strip()]
        assert commands == ["serve", "pull", "models", "rm"]
    assert min(took) < 0.3


def test_the_daemon_imports_neither_engines_nor_a_command_lines_ornaments() -> None:
    heavy = ["numpy", "torch", "xllamacpp", "gguf", "huggingface_hub", "rich", "requests"]
    code = f"import sys, helexa.neuron.serve; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_version_is_told(cli: Cli) -> None:
    assert cli("--version", config=False).stdout.startswith(f"neuron {__version__}")


@pytest.mark.parametrize("args", [["nonsense"], ["serve", "--port", "x"], ["serve", "--port", "70000"], ["pull"], []])
def test_a_mistake_in_the_call_is_code_2(cli: Cli, args: list[str]) -> None:
    result = cli(*args, config=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_a_rank_ends_with_its_leader_s_pipe_and_a_wrong_place_is_told(cli: Cli) -> None:
    assert cli("--worker", "--rank", "1", "--world-size", "2", "--device", "1", config=False).returncode == 0
    result = cli("--worker", "--rank", "2", "--world-size", "2", "--device", "1", config=False)
    assert result.returncode == 2
    assert "--rank is 0 to 1" in result.stderr
    assert result.stdout == ""


def test_models_lists_what_is_on_disk(cli: Cli) -> None:
    assert cli("models").stdout == ""
    assert "neuron pull" in cli("models").stderr
    (cli.models / "sub").mkdir()
    (cli.models / "sub" / "tiny.gguf").write_bytes(MODEL)
    table = cli("models")
    assert "sub/tiny" in table.stdout
    listed = json.loads(cli("models", "--json").stdout)
    assert [entry["id"] for entry in listed] == ["sub/tiny"]
    assert listed[0]["status"] == "unloaded"
    assert listed[0]["files"] == [str(cli.models / "sub" / "tiny.gguf")]


def test_rm_removes_what_nobody_uses(cli: Cli) -> None:
    file = cli.models / "tiny.gguf"
    file.write_bytes(MODEL)
    result = cli("rm", "tiny")
    assert (result.returncode, result.stdout) == (0, f"{file}\n")
    assert not file.exists()
    again = cli("rm", "tiny")
    assert again.returncode == 1
    assert "tiny" in again.stderr


def test_rm_removes_the_prompt_caches_of_the_model_too(cli: Cli) -> None:
    file, other = cli.models / "tiny.gguf", cli.models / "other.gguf"
    file.write_bytes(MODEL)
    kept = KvStore(cli.folder / "cache" / "kv", limit_mb=100, max_age_s=1000)
    put(kept, "a conversation", files=[str(file)])
    stays = put(kept, "another", files=[str(other)])
    result = cli("rm", "tiny")
    assert (result.returncode, result.stdout) == (0, f"{file}\n")
    assert "prompt caches that were saved of it are removed too: 1" in result.stderr
    assert [path.stem for path in kept.folder.glob("*.kv")] == [stays.name]


def test_rm_leaves_a_file_that_some_process_has_mapped(cli: Cli) -> None:
    file = cli.models / "tiny.gguf"
    file.write_bytes(MODEL)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ):
        result = cli("rm", "tiny")
    assert result.returncode == 1
    assert "loaded" in result.stderr
    assert file.exists()


def test_a_running_daemons_models_are_shown_and_kept(cli: Cli) -> None:
    path = write_model(cli.models / "m.gguf")
    with neuron(cli.folder, f'models_dir = "{cli.models}"', module="tests.helpers.scripted_neuron") as daemon:
        port = daemon.url.rpartition(":")[2]
        cli.config.write_text(f'models_dir = "{cli.models}"\nport = {port}\n')
        assert daemon.http.post("/models/load?wait=true", {"model_id": "other-name", "source": str(path)}).status == 200
        listed: list[dict[str, Any]] = json.loads(cli("models", "--json").stdout)
        assert {entry["id"]: entry["status"] for entry in listed}["other-name"] == "loaded"
        refused = cli("rm", "m")
        assert refused.returncode == 1
        assert path.exists()
        assert daemon.http.post("/models/unload", {"model_id": "other-name"}).status == 200
        assert cli("rm", "m").returncode == 0
    assert not path.exists()


def test_pull_prints_where_the_model_is(cli: Cli, hub: FakeHub) -> None:
    hub.add("owner/tiny-GGUF", {"tiny-Q8_0.gguf": MODEL})
    cli.env["HF_ENDPOINT"] = hub.endpoint
    result = cli("pull", "owner/tiny-GGUF:Q8_0")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).read_bytes() == MODEL
    told = json.loads(cli("pull", "owner/tiny-GGUF:Q8_0", "--json").stdout)
    assert told["fetched"] is False
    assert told["files"] == [result.stdout.strip()]
    assert "owner/tiny-GGUF:Q8_0" in cli("models").stdout


def test_pull_goes_on_after_a_break(cli: Cli, hub: FakeHub) -> None:
    hub.add("owner/tiny-GGUF", {"tiny-Q8_0.gguf": MODEL})
    hub.fail("tiny-Q8_0.gguf", BreakOff(len(MODEL) // 2))
    cli.env["HF_ENDPOINT"] = hub.endpoint
    result = cli("pull", "owner/tiny-GGUF:Q8_0")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).read_bytes() == MODEL


def test_pull_of_what_nobody_has_is_a_failure_with_a_reason(cli: Cli, hub: FakeHub) -> None:
    cli.env["HF_ENDPOINT"] = hub.endpoint
    result = cli("pull", "owner/nothing")
    assert result.returncode == 1
    assert "owner/nothing" in result.stderr
    assert result.stdout == ""
    assert cli("pull", "no-reference").returncode == 2
