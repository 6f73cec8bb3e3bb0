"""How a request ends in the engine when its client leaves: the ground that the session's rewriting stands on.

The engine looks at its clients only where a write fails, or where nothing happened for a second, to anybody. A long
prefill beside another stream is therefore given up only when it tells of its progress.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.models import smollm2

from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import FreeDevice, ModelFiles
from helexa.neuron.harness.llama import LlamaHarness

pytest.importorskip("xllamacpp")


@contextmanager
def connected(path: Path, method: str, target: str, body: dict[str, Any] | None = None) -> Iterator[socket.socket]:
    """A request on its way; leaving the block hangs up."""
    data = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {target} HTTP/1.1\r\nhost: engine\r\nauthorization: Bearer key\r\nconnection: close\r\n"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        yield connection


def busy_slots(path: Path) -> int:
    with connected(path, "GET", "/slots") as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return sum(slot["is_processing"] for slot in json.loads(answer.partition(b"\r\n\r\n")[2]))


def read_until(connection: socket.socket, words: bytes) -> None:
    read = b""
    while words not in read:
        data = connection.recv(65536)
        assert data, read
        read += data


def test_a_prefill_that_tells_of_its_progress_is_given_up_within_a_batch_beside_another_stream(tmp_path: Path) -> None:
    harness = LlamaHarness()
    model = ModelFiles("smol", (smollm2(),))
    request = LoadRequest(model_id="smol", context=4096, slots=2)
    devices = [FreeDevice(0, "cpu", "CPU", 16_000, 16_000)]
    plan = harness.plan(request, model, harness.inspect(model, request), devices)
    path = tmp_path / "engine.sock"
    engine = harness.serve(harness.host_spec(plan, path, "key"), lambda fraction: None)
    try:
        other = {"prompt": "Once upon a time", "max_tokens": 3000, "stream": True, "ignore_eos": True}
        long = {"prompt": "word " * 3500, "max_tokens": 1, "stream": True, "return_progress": True}
        with connected(path, "POST", "/completion", other) as stays:
            read_until(stays, b"data: ")
            with connected(path, "POST", "/completion", long) as leaves:
                read_until(leaves, b"prompt_progress")
                assert busy_slots(path) == 2
            left = time.monotonic()
            while busy_slots(path) == 2:
                # 1.5 s where nothing else runs (bench); the whole prefill would take from 15 s to minutes.
                assert time.monotonic() - left < 6
    finally:
        engine.close()
