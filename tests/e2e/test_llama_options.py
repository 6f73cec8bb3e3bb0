"""Each option of a profile, shown by its effect on the real engine; where that needs a GPU, that it reaches it.

The models are tiny and random: a load takes 50 ms, and what an option changes can be seen in /props, /slots, in the
answers' log-probabilities or in the process's memory.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import models, tiny_gguf

from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import FreeDevice, ModelFiles, Plan
from helexa.neuron.harness.llama import LlamaHarness
from helexa.neuron.harness.llama.engine import build_params, reason_in

pytest.importorskip("xllamacpp")
HARNESS = LlamaHarness()
KEY = "key"
CPU = [FreeDevice(0, "cpu", "CPU", 16_000, 16_000)]
GPUS = [FreeDevice(i, "cuda", f"GPU {i}", 20_000, 24_000) for i in range(3)]


class UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("engine", timeout=60)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self._path)


class Loaded:
    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan = plan
        self._path = path

    def ask(self, path: str, body: dict[str, Any] | None = None, key: str = KEY) -> tuple[int, Any]:
        connection = UnixConnection(self._path)
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request("POST" if body is not None else "GET", path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, json.loads(data)

    def complete(self, prompt: str = "hello", **fields: Any) -> dict[str, Any]:
        status, answer = self.ask(
            "/v1/completions", {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1, **fields}
        )
        assert status == 200, answer
        return dict(answer)

    def first_logprob(self) -> float:
        return float(self.complete()["choices"][0]["logprobs"]["content"][0]["logprob"])


Load = Callable[..., AbstractContextManager[Loaded]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    @contextmanager
    def loaded(files: ModelFiles | Path, **profile: Any) -> Iterator[Loaded]:
        plan = planned(files, CPU, **profile)
        path = tmp_path / "engine.sock"
        engine = HARNESS.serve(json.loads(json.dumps(HARNESS.host_spec(plan, path, KEY))), lambda fraction: None)
        try:
            yield Loaded(plan, path)
        finally:
            engine.close()

    return loaded


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.chat_model(tmp_path_factory.mktemp("chat") / "chat.gguf")


def planned(files: ModelFiles | Path, devices: list[FreeDevice], /, **profile: Any) -> Plan:
    if isinstance(files, Path):
        files = ModelFiles("tiny", (files,))
    request = LoadRequest(model_id="tiny", **({"context": 512, "slots": 2, "threads": 1} | profile))
    return HARNESS.plan(request, files, HARNESS.inspect(files, request), devices)


def params(files: ModelFiles | Path, devices: list[FreeDevice], /, **profile: Any) -> Any:
    return build_params(HARNESS.host_spec(planned(files, devices, **profile), Path("/tmp/x.sock"), KEY))


_DROPS = """
import faulthandler, sys
from pathlib import Path
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import FreeDevice, ModelFiles
from helexa.neuron.harness.llama import LlamaHarness
faulthandler.dump_traceback_later(50, exit=True)  # a hang holds the interpreter: nothing else could end it
harness, files, request = LlamaHarness(), ModelFiles("tiny", (Path(sys.argv[1]),)), LoadRequest(
    model_id="tiny", context=256, slots=1, threads=1, batch=32)
plan = harness.plan(request, files, harness.inspect(files, request), [FreeDevice(0, "cpu", "cpu", 8000, 8000)])
for n in range(50):
    spec = (harness.counting_spec if n % 2 else harness.host_spec)(plan, Path(sys.argv[2]), "key")
    harness.serve(spec, lambda fraction: None).close()
"""


def test_an_engine_can_be_dropped_right_after_its_load(tmp_path: Path) -> None:
    """As where a load is cancelled: one drop in ten used to hang, with the interpreter in its hands."""
    model = tiny_gguf.chat_model(tmp_path / "tiny.gguf")
    command = [sys.executable, "-c", _DROPS, str(model), str(tmp_path / "s.sock")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_engine_answers_on_its_socket_with_the_key_only_and_under_the_models_id(load: Load, chat: Path) -> None:
    with load(chat) as engine:
        assert engine.ask("/v1/models", key="other")[0] == 401
        assert engine.complete()["model"] == "tiny"


def test_closing_ends_the_server_and_takes_the_socket_away(tmp_path: Path, chat: Path) -> None:
    path = tmp_path / "s.sock"
    heard: list[float] = []
    engine = HARNESS.serve(HARNESS.host_spec(planned(chat, CPU), path, KEY), heard.append)
    assert path.exists()
    engine.close()
    assert not path.exists()
    assert heard == sorted(heard)
    assert (heard[0], heard[-1]) == (0.0, 1.0)


def test_context_and_slots_are_what_the_engine_has(load: Load, chat: Path) -> None:
    with load(chat, context=700, slots=3) as engine:
        status, slots = engine.ask("/slots")
        assert status == 200
        assert [slot["n_ctx"] for slot in slots] == [768] * 3 == [engine.plan.context] * engine.plan.slots
        assert engine.ask("/props")[1]["total_slots"] == 3
        status, error = engine.ask("/v1/completions", {"prompt": "a" * 2000, "max_tokens": 1})
        assert (status, error["error"]["n_ctx"]) == (400, 768)


def test_a_unified_cache_gives_every_slot_the_whole_context(load: Load, chat: Path) -> None:
    with load(chat, context=1024, slots=4, kv_unified=True) as engine:
        assert [slot["n_ctx"] for slot in engine.ask("/slots")[1]] == [1024] * 4


def test_a_quantised_cache_changes_the_numbers_a_little(load: Load, chat: Path) -> None:
    found = {}
    for kind in ("f32", "f16", "q4_0"):
        with load(chat, kv_cache=kind) as engine:
            found[kind] = engine.first_logprob()
    assert found["f32"] == pytest.approx(found["f16"], abs=0.02)
    assert found["q4_0"] != found["f32"]
    assert found["q4_0"] == pytest.approx(found["f32"], abs=1.0)


def test_flash_attention_on_and_off_agree(load: Load, chat: Path) -> None:
    found = []
    for flash in (True, False, None):
        with load(chat, flash_attention=flash) as engine:
            found.append(engine.first_logprob())
    assert found[0] == pytest.approx(found[1], abs=0.02)
    assert found[2] == found[0]  # left out, the engine turns it on here


def test_threads_reach_the_engine(load: Load, chat: Path) -> None:
    with load(chat, threads=2) as engine:
        assert engine.complete()["choices"][0]["text"]
    assert [params(chat, CPU, threads=n).cpuparams.n_threads for n in (1, 2)] == [1, 2]
    assert params(chat, CPU, threads=2).cpuparams_batch.n_threads == 2


def test_a_batch_is_what_one_step_of_the_prefill_takes(load: Load, chat: Path) -> None:
    steps = {}
    for batch in (32, 128):
        with load(chat, batch=batch) as engine:
            connection = UnixConnection(engine._path)
            body = {"prompt": "a" * 300, "max_tokens": 1, "stream": True, "return_progress": True}
            connection.request("POST", "/completion", json.dumps(body), {"authorization": f"Bearer {KEY}"})
            events = connection.getresponse().read().split(b"\n\n")
            connection.close()
        done = [json.loads(e[6:])["prompt_progress"]["processed"] for e in events if b"prompt_progress" in e]
        steps[batch] = max(b - a for a, b in pairwise(done))
    assert steps == {32: 32, 128: 128}


def test_the_prompt_cache_brings_back_what_left_its_slot(load: Load, chat: Path) -> None:
    cached = {}
    for mb in (0, 64):
        with load(chat, slots=1, prompt_cache_mb=mb) as engine:
            engine.complete("a" * 200)
            engine.complete("b" * 200)
            cached[mb] = engine.complete("a" * 200)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached[0] < 10
    assert cached[64] > 190


def test_a_chat_template_of_the_profile_replaces_the_models_own(load: Load, chat: Path) -> None:
    with load(chat, chat_template="{% for m in messages %}({{ m['content'] }}){% endfor %}") as engine:
        messages = {"messages": [{"role": "user", "content": "hi"}]}
        assert engine.ask("/apply-template", messages)[1]["prompt"] == "(hi)"


def test_a_draft_proposes_and_the_model_decides(load: Load, chat: Path, tmp_path: Path) -> None:
    files = ModelFiles("tiny", (chat,), draft=chat)  # its own draft: everything it proposes is taken
    with load(chat) as engine:
        alone = engine.complete(max_tokens=24)
    with load(files, draft=str(chat)) as engine:
        drafted = engine.complete(max_tokens=24)
    assert drafted["timings"]["draft_n_accepted"] > 0
    assert drafted["choices"][0]["text"] == alone["choices"][0]["text"]


def test_an_adapter_changes_the_answer(load: Load, chat: Path, tmp_path: Path) -> None:
    adapter = tiny_gguf.lora_adapter(tmp_path / "lora.gguf")
    with load(chat) as engine:
        plain = engine.first_logprob()
    with load(ModelFiles("tiny", (chat,), lora=(adapter,)), lora=[str(adapter)]) as engine:
        assert engine.ask("/lora-adapters")[1][0]["scale"] == 1.0
        assert engine.first_logprob() != plain


def test_a_projector_lets_the_model_see(load: Load, chat: Path, tmp_path: Path) -> None:
    eye = tiny_gguf.projector(tmp_path / "mmproj.gguf")
    with load(ModelFiles("tiny", (chat,), projector=eye), projector=str(eye)) as engine:
        assert engine.ask("/props")[1]["modalities"]["vision"] is True
        image = (
            "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5"
            "ErkJggg=="
        )
        parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": image}}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}
        status, answer = engine.ask("/v1/chat/completions", body)
        assert status == 200, answer
        text_alone = {"messages": [{"role": "user", "content": "what?"}], "max_tokens": 4}
        alone = engine.ask("/v1/chat/completions", text_alone)[1]
        assert answer["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"]


def test_an_embedding_model_embeds_several_inputs_each_whole(load: Load, tmp_path: Path) -> None:
    model = tiny_gguf.embedding_model(tmp_path / "embed.gguf")
    with load(model, context=None, slots=None) as engine:
        status, answer = engine.ask("/v1/embeddings", {"input": ["hello", "world", "hello"]})
        assert status == 200
        first, second, third = (item["embedding"] for item in answer["data"])
        assert len(first) == 64
        assert first == pytest.approx(third, abs=1e-5)
        assert first != second
        assert sum(x * x for x in first) == pytest.approx(1.0, abs=1e-4)
        status, answer = engine.ask("/v1/embeddings", {"input": "a " * 400})
        assert status == 200, answer


def test_a_chat_model_embeds_where_the_task_says_so(load: Load, chat: Path) -> None:
    with load(chat, task="embed") as engine:
        status, answer = engine.ask("/v1/embeddings", {"input": "hello"})
        assert (status, len(answer["data"][0]["embedding"])) == (200, 64)


def test_a_rerank_model_ranks(load: Load, tmp_path: Path) -> None:
    model = tiny_gguf.rerank_model(tmp_path / "rerank.gguf")
    with load(model) as engine:
        body = {"query": "what is a panda", "documents": ["a bear", "a car", "the sea"]}
        status, answer = engine.ask("/v1/rerank", body)
        assert status == 200, answer
        assert sorted(result["index"] for result in answer["results"]) == [0, 1, 2]
        assert len({result["relevance_score"] for result in answer["results"]}) == 3


def test_a_split_model_is_loaded_with_all_its_parts(load: Load, chat: Path, tmp_path: Path) -> None:
    with load(ModelFiles("tiny", tiny_gguf.split_model(tmp_path, 3))) as engine:
        split = engine.first_logprob()
    with load(chat) as engine:
        assert engine.first_logprob() == split


def test_devices_shares_and_layers_reach_the_engine(chat: Path) -> None:
    found = params(chat, GPUS, devices=[1, 2], shares=[3, 1], gpu_layers=2)
    assert list(found.tensor_split)[:4] == [0, 3, 1, 0]
    assert (found.n_gpu_layers, found.main_gpu, found.split_mode.name) == (2, 1, "LLAMA_SPLIT_MODE_LAYER")
    one = params(chat, GPUS, devices=[2])
    assert (one.n_gpu_layers, one.main_gpu, one.split_mode.name) == (3, 2, "LLAMA_SPLIT_MODE_NONE")
    assert params(chat, CPU).n_gpu_layers == 0


def test_tensor_parallel_reaches_the_engine(chat: Path) -> None:
    found = params(chat, GPUS, tensor_parallel=2)
    assert found.split_mode.name == "LLAMA_SPLIT_MODE_TENSOR"
    assert list(found.tensor_split)[:3] == [1, 1, 0]


def test_a_wish_for_many_devices_reaches_the_engine(chat: Path) -> None:
    found = params(chat, GPUS, min_devices=3, min_device_vram_mb=10_000)
    assert [share > 0 for share in list(found.tensor_split)[:4]] == [True, True, True, False]


def test_what_the_engine_cannot_load_has_its_own_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_gguf.chat_model(tmp_path / "odd.gguf")
    plan = planned(model, CPU)
    spec = HARNESS.host_spec(plan, tmp_path / "s.sock", KEY)
    data = bytearray(model.read_bytes())
    at = data.find(b"blk.1.attn_q.weight")
    data[at : at + 19] = b"blk.1.attn_x.weight"
    model.write_bytes(bytes(data))
    with pytest.raises(RuntimeError, match=r"could not load tiny: .*tensor 'blk\.1\.attn_q\.weight' not found"):
        HARNESS.serve(spec, lambda fraction: None)
    assert "attn_q.weight' not found" in capfd.readouterr().err  # the log went where it goes, too
    assert not (tmp_path / "s.sock").exists()


def test_two_loads_at_once_in_one_process_leave_standard_error_as_it_was(
    tmp_path: Path, chat: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    specs = [HARNESS.host_spec(planned(chat, CPU), tmp_path / f"{i}.sock", KEY) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        engines = list(pool.map(lambda spec: HARNESS.serve(spec, lambda fraction: None), specs))
    for engine in engines:
        engine.close()
    os.write(2, b"still here\n")
    assert capfd.readouterr().err.endswith("still here\n")


def test_files_that_went_away_are_named(tmp_path: Path) -> None:
    model = tiny_gguf.chat_model(tmp_path / "gone.gguf")
    spec = HARNESS.host_spec(planned(model, CPU), tmp_path / "s.sock", KEY)
    model.unlink()
    with pytest.raises(RuntimeError, match=r"gone\.gguf is not there"):
        HARNESS.serve(spec, lambda fraction: None)


def test_the_first_error_that_says_something_is_the_reason() -> None:
    log = (
        "0.00.1 I srv          init: initializing ...\n"
        "0.00.2 E llama_model_load: error loading model: unknown model architecture: 'x'\n"
        "0.00.3 E srv    load_model: failed to load model, '/m.gguf'\n"
    )
    assert reason_in(log) == "error loading model: unknown model architecture: 'x'"
    assert reason_in("nothing here") is None


MEASURE = """
import json, sys
from helexa.neuron.harness.llama import LlamaHarness
from http.client import HTTPConnection
import socket, psutil
spec = json.loads(sys.argv[1])
engine = LlamaHarness().serve(spec, lambda fraction: None)
class Unix(HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX); self.sock.connect(spec["socket"])
connection = Unix("engine")
body = {"prompt": "word " * int(sys.argv[2]), "max_tokens": 4}
connection.request("POST", "/v1/completions", json.dumps(body), {"authorization": "Bearer key"})
assert connection.getresponse().status == 200
print(psutil.Process().memory_info().rss >> 20, flush=True)
import os
os._exit(0)
"""


@pytest.mark.parametrize(
    ("model", "profile"),
    [
        ("smollm2", {"context": 2048, "slots": 4}),
        ("smollm2", {"context": 8192, "slots": 1, "kv_cache": "q8_0"}),
        ("smollm2", {"context": 2048, "slots": 1, "batch": 512}),
        ("gemma", {"context": 4096, "slots": 2}),
        ("gemma", {"context": 8192, "slots": 1, "batch": 512, "kv_unified": True}),
    ],
)
def test_an_estimate_is_near_what_the_process_takes(tmp_path: Path, model: str, profile: dict[str, Any]) -> None:
    path = getattr(models, model)()
    plan = planned(path, CPU, prompt_cache_mb=0, **profile)
    spec = HARNESS.host_spec(plan, tmp_path / "s.sock", KEY)
    words = 600 if "batch" in profile else 150  # some batches
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(spec), str(words)],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    took = int(found.stdout.split()[-1])
    need = plan.estimate.devices[0].need_mb
    assert took <= need * 1.02, plan.estimate
    assert need <= took * 1.2, plan.estimate
