"""The host process itself: its orders, its events, and that it outlives nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.helpers.neuron_daemon import OURS
from tests.helpers.scripted import Script, write_model

HARNESS = "tests.helpers.scripted:ScriptedHarness"
COMMAND = (sys.executable, "-P", "-m", "helexa.neuron.host", "--harness")
ENV = {**os.environ, "PYTHONPATH": OURS}

# A daemon in small: starts a host, gives it the order in its arguments, and waits to be killed.
DAEMON = """
import os, subprocess, sys, time
harness, order = sys.argv[1:]
host = subprocess.Popen([sys.executable, "-P", "-m", "helexa.neuron.host", "--harness", harness,
                         "--parent", str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
assert b"ready" in host.stdout.readline()
host.stdin.write(order.encode() + b"\\n")
host.stdin.flush()
print(host.pid, host.stdout.readline().decode(), flush=True)
time.sleep(60)
"""


class Running:
    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV
        )

    def order(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def event(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        event: dict[str, Any] = json.loads(self.process.stdout.readline())
        return event

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def host() -> Iterator[Running]:
    running = Running(HARNESS)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture
def spec(tmp_path: Path) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="helexa-test-") as folder:
        file = write_model(tmp_path / "a.gguf")
        yield {"file": str(file), "socket": f"{folder}/s", "api_key": "k", "states": None}


def test_it_is_ready_loads_and_quits(host: Running, spec: dict[str, Any]) -> None:
    assert host.event() == {"event": "ready"}
    host.order(op="load", harness=HARNESS, spec=spec)
    assert host.event() == {"event": "progress", "fraction": 0.5}
    assert host.event() == {"event": "loaded"}
    host.order(op="quit")
    assert host.process.wait(10) == 0


def test_a_load_that_fails_is_told_with_its_reason(host: Running, spec: dict[str, Any]) -> None:
    write_model(Path(spec["file"]), Script(fail="no such luck"))
    host.event()
    host.order(op="load", harness=HARNESS, spec=spec)
    host.event()
    assert host.event() == {"event": "failed", "error": "no such luck", "out_of_memory": False}
    assert host.process.wait(10) == 1


def test_a_harness_that_is_not_there_is_told() -> None:
    host = Running("no.such:Harness")
    event = host.event()
    assert event["event"] == "failed"
    assert "no.such:Harness" in event["error"]
    assert "llama" in event["error"]
    assert host.process.wait(10) == 1
    host.close()


def test_the_end_of_its_orders_ends_it(host: Running) -> None:
    host.event()
    assert host.process.stdin is not None
    host.process.stdin.close()
    assert host.process.wait(10) == 0
    host.process.stdin = None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_for_the_whole_group_are_left_to_the_daemon(host: Running, number: int) -> None:
    host.event()
    host.process.send_signal(number)
    host.order(op="quit")
    assert host.process.wait(10) == 0


def test_it_does_not_start_for_a_daemon_that_is_gone() -> None:
    host = Running(HARNESS, "--parent", "1")
    assert host.process.wait(10) == 0
    assert host.process.stdout is not None
    assert host.process.stdout.read() == b""
    host.close()


@pytest.mark.parametrize(
    "script", [Script(), Script(hold_interpreter=True)], ids=["serving", "holding the interpreter"]
)
def test_it_dies_with_its_daemon(spec: dict[str, Any], script: Script) -> None:
    write_model(Path(spec["file"]), script)
    order = json.dumps({"op": "load", "harness": HARNESS, "spec": spec})
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON, HARNESS, order], stdout=subprocess.PIPE, env=ENV)
    try:
        assert daemon.stdout is not None
        host = psutil.Process(int(daemon.stdout.readline().split()[0]))
        assert host.is_running()
    finally:
        daemon.kill()
        daemon.communicate()
    psutil.wait_procs([host], 5)
    assert not host.is_running()
