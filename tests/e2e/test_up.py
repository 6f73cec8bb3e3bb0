"""`cortex up` as a person types it: a first answer, a way to go on, and nothing left behind however it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from openai import OpenAI
from tests.helpers.gateway import environment
from tests.helpers.models import smollm2
from tests.helpers.safetensors_models import random_model
from tests.helpers.torch_serving import need_torch

pytestmark = pytest.mark.timeout(300)
START_S = 120.0


class Up:
    """The running command. What it prints is kept, and can be waited for."""

    def __init__(self, *arguments: str, runtime: Path) -> None:
        command = [sys.executable, "-m", "helexa.cortex", "up", *arguments]
        env = environment() | {"XDG_RUNTIME_DIR": str(runtime), "TMPDIR": str(runtime), "CACHE_DIRECTORY": str(runtime)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._news = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.out), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.err), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: object, into: list[str]) -> None:
        for line in pipe:  # type: ignore[attr-defined]
            with self._news:
                into.append(line)
                self._news.notify_all()

    def wait_for(self, words: str) -> str:
        """All of stdout, once these words are in it."""
        with self._news:
            self._news.wait_for(lambda: words in "".join(self.out) or self.process.poll() is not None, START_S)
        text = "".join(self.out)
        assert words in text, f"{text}\n--- stderr\n{''.join(self.err)}"
        return text

    @property
    def url(self) -> str:
        found = re.search(r"is served at (http://\S+)/v1", self.wait_for("is served at"))
        assert found is not None
        return found[1]

    def family(self) -> list[psutil.Process]:
        """Every process that it started, and those started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@contextmanager
def up(folder: Path, *arguments: str) -> Iterator[Up]:
    runtime = folder / "r"
    runtime.mkdir(exist_ok=True)
    running = Up("--listen", "127.0.0.1:0", "--neuron-port", "0", *arguments, runtime=runtime)
    try:
        yield running
    finally:
        running.close()


def assert_gone(processes: list[psutil.Process], within_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    assert not alive, f"still there: {[p.cmdline() for p in alive]}"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: a socket's path may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="up-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_says_how_to_go_on_and_leaves_nothing_behind(short: Path, number: int) -> None:
    smollm2()
    with up(short) as running:
        text = running.wait_for("Ctrl-C ends it.")
        url = running.url
        assert f"curl {url}/v1/chat/completions" in text
        assert f'OpenAI(base_url="{url}/v1"' in text
        answer = re.search(r"\n> .*\n(.+)\n\[(\d+) tokens, [\d.]+ tok/s", text)
        assert answer is not None, text
        assert int(answer[2]) > 1
        with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:
            ask = [{"role": "user", "content": "Hi"}]
            said = client.chat.completions.create(model="smollm2", messages=ask, max_tokens=4)  # type: ignore[arg-type]
        assert said.choices[0].message.content
        family = running.family()
        assert len(family) >= 3  # a gateway, a node, a host
        assert running.end(number) == 0
        assert_gone(family, 1.0)
    assert not list((short / "r").rglob("*.sock"))
    assert not list((short / "r").glob("helexa-up-*"))


def test_a_killed_parent_takes_its_children_with_it(short: Path) -> None:
    smollm2()
    with up(short) as running:
        running.wait_for("Ctrl-C ends it.")
        family = running.family()
        os.kill(running.process.pid, signal.SIGKILL)
        assert_gone(family, 15.0)


def test_an_end_in_mid_start_leaves_nothing_behind(short: Path) -> None:
    smollm2()
    with up(short) as running:
        deadline = time.monotonic() + 20
        while len(family := running.family()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.end(signal.SIGTERM) == 0
        assert_gone(family, 1.0)


def test_a_file_is_served_under_its_name(short: Path) -> None:
    link = short / "my-model.gguf"
    link.symlink_to(smollm2())
    with up(short, str(link), "--context", "512") as running:
        running.wait_for("Ctrl-C ends it.")
        with OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=60) as client:
            (model,) = client.models.list()
        assert (model.id, model.model_dump()["max_model_len"]) == ("my-model", 512)


def test_a_file_that_is_not_whole_is_refused_with_the_reason(short: Path) -> None:
    broken = short / "broken.gguf"
    with smollm2().open("rb") as whole:
        broken.write_bytes(whole.read(1 << 20))
    with up(short, str(broken)) as running:
        assert running.process.wait(60) == 1
        said = "".join(running.err)
        assert "broken" in said
        assert "Traceback" not in said


def test_a_node_that_dies_ends_it_with_its_last_words(short: Path) -> None:
    smollm2()
    with up(short) as running:
        running.wait_for("Ctrl-C ends it.")
        family = running.family()
        node = next(p for p in family if "helexa.neuron" in p.cmdline() and "serve" in p.cmdline())
        node.kill()
        assert running.process.wait(30) == 1
        assert "neuron was ended by SIGKILL" in "".join(running.err)
        assert_gone(family, 5.0)


def test_a_taken_port_is_named(short: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with up(short, "--listen", f"127.0.0.1:{port}") as running:
            assert running.process.wait(20) == 2
            assert f"port {port} on 127.0.0.1 is taken" in "".join(running.err)
            assert running.out == []


def test_a_folder_with_safetensors_is_served_too(short: Path) -> None:
    need_torch()
    with up(short, str(random_model("qwen3"))) as running:
        with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            (model,) = client.models.list()
            assert model.id == "qwen3"
            answer = client.completions.create(model="qwen3", prompt="x", max_tokens=2)
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        family = running.family()
        assert running.end(signal.SIGTERM) == 0
        assert_gone(family, 5)
