"""The files in config/ start the programs as they are; only the ports are free ones, which the environment asks for."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[2] / "config"


@contextmanager
def started(program: str, config: Path, env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The program and its "listening" line."""
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("CORTEX_", "NEURON_"))}
    command = [sys.executable, "-m", f"helexa.{program}", "serve", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**quiet, **env}) as process:
        lines: queue.Queue[str] = queue.Queue()
        assert process.stderr is not None
        reader = threading.Thread(target=_read, args=(process.stderr, lines), daemon=True)
        reader.start()
        try:
            yield process, _listening(lines)
        finally:
            process.kill()
            process.wait(10)
            reader.join(10)


def _read(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _listening(lines: queue.Queue[str]) -> dict[str, Any]:
    seen = []
    while line := lines.get(timeout=30):
        seen.append(line)
        if line.startswith("{") and (said := json.loads(line))["event"] == "listening":
            return dict(said)
    raise AssertionError(f"it ended without listening: {seen}")


def health(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
        return dict(json.load(answer))


def test_cortex_starts_from_its_example_with_the_example_catalogue() -> None:
    env = {
        "CORTEX_GATEWAY__LISTEN": "127.0.0.1:0",
        "CORTEX_GATEWAY__METRICS_LISTEN": "127.0.0.1:0",
        "CORTEX_GATEWAY__MODELS_CONFIG": str(CONFIG / "models.example.toml"),
    }
    with started("cortex", CONFIG / "cortex.example.toml", env) as (process, said):
        found = health(said["url"])
        assert found["status"] == "ok"
        assert found["catalogue"] == {"path": str(CONFIG / "models.example.toml"), "models": 1}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_neuron_starts_from_its_example() -> None:
    with started("neuron", CONFIG / "neuron.example.toml", {"NEURON_PORT": "0"}) as (process, said):
        assert health(said["url"])["status"] in ("starting", "ok")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
