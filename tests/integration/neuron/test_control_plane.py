"""The control plane of a real `neuron serve` with nothing loaded: answers, refusals, and who is let in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.http import Reply
from tests.helpers.neuron_daemon import Daemon, neuron

from helexa.neuron.harness import KNOWN, open_harness


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("neuron")
    with neuron(
        folder, f'models_dir = "{folder}"\nallowed_hosts = ["gpu.example.com"]\nmemory_limit_mb = [2000]'
    ) as it:
        yield it


def error_of(response: Reply) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return error


def test_discovery_names_the_host_its_devices_and_its_harnesses(daemon: Daemon) -> None:
    found = daemon.http.get("/discovery").json()
    assert found["hostname"] == socket.gethostname()
    assert {"os", "kernel"} <= set(found)
    assert found["devices"][0]["index"] == 0
    usable = [name for name in KNOWN if open_harness(name).why_not() is None]
    assert found["harnesses"] == usable
    assert "llama" in usable


def test_health_tells_of_each_device(daemon: Daemon) -> None:
    health = daemon.http.get("/health").json()
    assert health["status"] == "ok"
    assert health["uptime_secs"] > 0
    assert health["devices"][0]["vram_free_mb"] > 0


def test_version_names_the_engines(daemon: Daemon) -> None:
    version = daemon.http.get("/version").json()
    assert {"version", "commit", "python", "engines"} <= set(version)
    assert "llama" in version["engines"]


def test_listings_are_lists_when_nothing_is_there(daemon: Daemon) -> None:
    assert daemon.http.get("/models").json() == []
    assert daemon.http.get("/v1/models").json() == {"object": "list", "data": []}


def test_metrics_are_prometheus_text(daemon: Daemon) -> None:
    response = daemon.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'neuron_device_memory_bytes{device="0",kind="total"}' in response.text


def test_a_request_id_is_echoed(daemon: Daemon) -> None:
    assert daemon.http.get("/health", headers={"x-request-id": "mine.1"}).headers["x-request-id"] == "mine.1"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/model", 404, "not_found"),
        ("GET", "/models/", 404, "not_found"),
        ("DELETE", "/models", 405, "method_not_allowed"),
        ("GET", "/models/load", 405, "method_not_allowed"),
        ("POST", "/v1/responses", 404, "not_found"),
        ("GET", "/models/nobody/endpoint", 404, "model_not_found"),
        ("GET", "/models/a/b%2Fc/endpoint", 404, "model_not_found"),
    ],
)
def test_what_is_not_there_is_told_in_our_words(daemon: Daemon, method: str, path: str, status: int, code: str) -> None:
    response = daemon.http.request(method, path)
    assert response.status == status
    assert error_of(response)["code"] == code


def test_a_wrong_method_names_the_right_one(daemon: Daemon) -> None:
    response = daemon.http.get("/models/unload")
    assert response.headers["allow"] == "POST"
    assert "POST" in error_of(response)["message"]


def test_a_wrong_path_names_the_nearest(daemon: Daemon) -> None:
    assert "/discovery" in error_of(daemon.http.get("/discover"))["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/models/load", {"model_id": "a", "context": "long"}, "context"),
        ("/models/load", {"model_id": "a", "contxt": 5}, "contxt"),
        ("/models/load", {"model_id": 7}, "model_id"),
        ("/models/load", {"context": 5}, "model_id"),
        ("/models/load", {"model_id": "a\r\nb"}, "model_id"),
        ("/models/load", {"model_id": "a", "model": "b"}, "model"),
        ("/models/load", {"model_id": "a", "devices": [0, 0]}, "devices"),
        ("/models/load", {"model_id": "a", "lora": ["x", 3]}, "lora[1]"),
        ("/models/load?wait=perhaps", {"model_id": "a"}, "wait"),
        ("/models/estimate", {"model_id": "a", "harness": "lama"}, "harness"),
        ("/models/unload", {"model_id": "a", "force": "yes"}, "force"),
        ("/models/unload", {"model_id": "a", "drain_s": -1}, "drain_s"),
        ("/models/unload", {}, "model_id"),
        ("/v1/tokens/count", {"messages": []}, "model"),
        ("/v1/tokens/count", {"model": 1}, "model"),
    ],
)
def test_a_field_at_fault_is_named(daemon: Daemon, path: str, body: dict[str, Any], param: str) -> None:
    response = daemon.http.post(path, json=body)
    assert response.status == 400
    error = error_of(response)
    assert error["param"] == param
    assert param.split("[")[0] in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model_id": "\xff"}'])
def test_a_body_that_is_no_request_is_refused(daemon: Daemon, body: bytes) -> None:
    response = daemon.http.request("POST", "/models/load", body=body, headers={"content-type": "application/json"})
    assert response.status == 400
    error_of(response)


def test_an_unknown_model_is_404_and_says_where_it_was_looked_for(daemon: Daemon) -> None:
    for path, body in (("/models/unload", {"model_id": "nobody"}), ("/v1/tokens/count", {"model": "nobody"})):
        response = daemon.http.post(path, json=body)
        assert response.status == 404, path
        assert error_of(response)["code"] == "model_not_found"
        assert "nobody" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank"])
def test_the_inference_plane_refuses_in_the_same_words(daemon: Daemon, path: str) -> None:
    response = daemon.http.post(path, json={"model": "nobody"})
    assert response.status == 404
    assert error_of(response)["code"] == "model_not_found"
    assert daemon.http.request("POST", path, body=b"{").status == 400


@pytest.mark.parametrize("media", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_could_send_is_refused(daemon: Daemon, media: str | None) -> None:
    headers = {} if media is None else {"content-type": media}
    response = daemon.http.request("POST", "/models/load", body=b'{"model_id": "a"}', headers=headers)
    assert response.status == 415
    assert "application/json" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/models/load", "/models/unload", "/models/estimate", "/defrag"])
def test_a_web_page_cannot_manage(daemon: Daemon, path: str) -> None:
    for origin in ("http://evil.example", "null", daemon.url):
        response = daemon.http.post(path, json={"model_id": "a"}, headers={"origin": origin})
        assert response.status == 403
        assert error_of(response)["code"] == "permission_denied"


@pytest.mark.parametrize("path", ["/models", "/health", "/events", "/v1/models", "/models/load"])
def test_a_foreign_host_is_refused_everywhere(daemon: Daemon, path: str) -> None:
    response = daemon.http.get(path, headers={"host": "rebound.evil.example:13131"})
    assert response.status == 403
    assert "allowed_hosts" in error_of(response)["message"]


def test_a_foreign_host_may_not_ask_for_tokens_either(daemon: Daemon) -> None:
    response = daemon.http.post("/v1/chat/completions", {"model": "a"}, headers={"host": "rebound.evil.example"})
    assert response.status == 403
    assert error_of(response)["code"] == "permission_denied"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]", "gpu.example.com", "gpu.internal", "gpu"])
def test_our_own_names_are_let_in(daemon: Daemon, host: str) -> None:
    assert daemon.http.get("/health", headers={"host": host}).status == 200


def test_listings_answer_within_milliseconds(daemon: Daemon) -> None:
    for path in ("/models", "/health"):
        took = []
        for _ in range(50):
            start = time.perf_counter()
            assert daemon.http.get(path).status == 200
            took.append(time.perf_counter() - start)
        assert sorted(took)[25] < 0.01, path  # the client's own part is most of it


def test_an_idle_daemon_is_small(daemon: Daemon) -> None:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    resident_mb = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    assert resident_mb < 80


def test_every_response_says_which_request_it_answers_and_the_log_has_one_line_for_it(daemon: Daemon) -> None:
    daemon.http.post("/v1/chat/completions", json={"model": "x"}, headers={"x-request-id": "logged-once"})
    line = daemon.wait_for(event="request", request_id="logged-once")
    assert line["status"] == 404
    assert line["error"] == "model_not_found"
    assert line["model"] == "x"
    daemon.http.post("/v1/chat/completions", json={"model": "x"}, headers={"x-request-id": "after"})
    daemon.wait_for(event="request", request_id="after")
    assert sum(line.get("request_id") == "logged-once" for line in daemon.said()) == 1


def test_a_token_is_asked_of_everyone(tmp_path: Path) -> None:
    with neuron(tmp_path, 'token = "s3cret"') as it:
        for method, path in (
            ("GET", "/health"),
            ("GET", "/models"),
            ("GET", "/events"),
            ("GET", "/metrics"),
            ("POST", "/models/load"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/tokens/count"),
        ):
            response = it.http.request(method, path, json={"model": "a"} if method == "POST" else None)
            assert response.status == 401, path
            assert error_of(response)["code"] == "invalid_api_key"
            assert "s3cret" not in response.text
        bearer = {"authorization": "Bearer s3cret"}
        assert it.http.get("/health", headers=bearer).status == 200
        answer = it.http.post("/v1/chat/completions", json={"model": "a"}, headers=bearer)
        assert answer.status == 404


def test_a_taken_port_is_named_with_the_way_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "helexa.neuron", "serve", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, "HF_HOME": str(tmp_path)},
        )
    assert result.returncode == 2
    assert f"port {port}" in result.stderr
    assert "--port" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("toml", "said"),
    [("prot = 1", "port"), ('port = "x"', "port"), ("memory_limit_mb = 5", "memory_limit_mb"), ("=", "neuron.toml")],
)
def test_a_wrong_file_ends_with_code_2_and_the_key(tmp_path: Path, toml: str, said: str) -> None:
    config = tmp_path / "neuron.toml"
    config.write_text(toml)
    result = subprocess.run(
        [sys.executable, "-m", "helexa.neuron", "serve", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_for_sockets_that_cannot_be_is_a_mistake_in_the_file(tmp_path: Path) -> None:
    config = tmp_path / "neuron.toml"
    config.write_text('run_dir = "/proc/nowhere"')
    result = subprocess.run(
        [sys.executable, "-m", "helexa.neuron", "serve", "--config", str(config), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 2
    assert "run_dir" in result.stderr
    assert "Traceback" not in result.stderr


def test_sigterm_ends_an_idle_daemon_at_once_with_code_0(tmp_path: Path) -> None:
    with neuron(tmp_path) as it:
        start = time.monotonic()
        assert it.stop() == 0
        assert time.monotonic() - start < 5
        assert "Traceback" not in it.log


def test_a_connection_that_leaves_in_mid_answer_is_no_error(daemon: Daemon) -> None:
    for _ in range(3):
        with daemon.http.stream("GET", "/events") as events:
            next(events.events())
    assert daemon.http.get("/health").status == 200
    assert "a handler failed" not in daemon.log
