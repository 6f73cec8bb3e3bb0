"""A real `neuron serve` with real host processes whose engine does as it is told: loads, queues, faults, the drain."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.helpers.aio import run
from tests.helpers.http import Http, Reply, Streamed
from tests.helpers.neuron_daemon import Daemon, Events, neuron
from tests.helpers.scripted import Gate, Script, loads_of, write_model

CHAT = "/v1/chat/completions"


class House:
    """A daemon and the folder of its models."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.daemon = daemon
        self.http = daemon.http
        self.folder = folder

    def model(self, name: str, script: Script | None = None) -> Path:
        return write_model(self.folder / f"{name}.gguf", script)

    def load(self, name: str, script: Script | None = None, **more: Any) -> Path:
        path = self.model(name, script)
        answer = self.http.post("/models/load?wait=true", {"model_id": name, "source": str(path), **more})
        assert answer.status == 200, answer.text
        return path

    def entry(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(it for it in self.http.get("/models").json() if it["id"] == name)
        return found

    def until(self, name: str, so: Callable[[dict[str, Any]], bool] = bool, **fields: Any) -> dict[str, Any]:
        """The model's entry once it has these fields, and is `so`."""
        deadline = time.monotonic() + 20
        while not (fields.items() <= (entry := self.entry(name)).items() and so(entry)):
            assert time.monotonic() < deadline, entry
            time.sleep(0.01)  # the next question, not the answer, may wait
        return entry

    def ask(self, name: str, **order: Any) -> Reply:
        return self.http.post(CHAT, {"model": name, **order})


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with started(tmp_path) as it:
        yield it


both = pytest.mark.parametrize("isolation", ["process", "none"])


@contextmanager
def started(folder: Path, toml: str = "") -> Iterator[House]:
    models = folder / "models"
    models.mkdir()
    settings = f'models_dir = "{models}"\nmemory_limit_mb = [1000]\ndrain_s = 1\n{toml}'
    with neuron(folder, settings, module="tests.helpers.scripted_neuron") as daemon:
        yield House(daemon, models)


class Streaming:
    """A request in a thread of its own, for what must happen meanwhile."""

    def __init__(self, house: House, name: str, **order: Any) -> None:
        self._http = Http(house.daemon.url)
        self._order = {"model": name, **order}
        self.reply: Reply | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.reply = self._http.post(CHAT, self._order)

    def answer(self) -> Reply:
        self._thread.join(20)
        assert self.reply is not None
        return self.reply


def first(streamed: Streamed) -> Iterator[Any]:
    """The events of a stream whose first one has come."""
    events = streamed.events()
    assert next(events) == {"n": 0}
    return events


def hosts(daemon: Daemon) -> list[psutil.Process]:
    return psutil.Process(daemon.process.pid).children(recursive=True)


def test_a_load_answers_at_once_and_tells_how_far_it_is(house: House, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    path = house.model("big", Script(gate=str(gate.path)))
    with Events(house.daemon) as events:
        answer = house.http.post("/models/load", {"model_id": "big", "source": str(path)})
        assert (answer.status, answer.json()) == (202, {"status": "loading"})
        _, loading = events.wait_for(type="model", id="big", status="loading")
        run(gate.reached())
        entry = house.until("big", lambda it: "fraction" in it.get("progress", {}), status="loading")
        assert 0 < entry["progress"]["fraction"] < 1
        waiting = house.ask("big")
        assert waiting.status == 503
        assert int(waiting.headers["retry-after"]) > 0
        error = waiting.json()["error"]
        assert error["code"] == "model_loading"
        assert error["loading"]["state"] == "loading"
        assert house.http.get("/models/big/endpoint").json()["error"]["code"] == "model_loading"
        gate.open()
        _, loaded = events.wait_for(type="model", id="big", status="loaded", after=loading["seq"])
        assert loaded["load_seconds"] > 0
    assert house.ask("big").status == 200


def test_a_change_is_told_within_100_ms(house: House) -> None:
    house.load("m")
    with Events(house.daemon) as events:
        for _ in range(5):
            seq = events.seen[-1][1]["seq"]
            assert house.http.post("/models/unload", {"model_id": "m"}).status == 200
            told = time.monotonic()
            at, _ = events.wait_for(type="model", id="m", status="unloaded", after=seq)
            assert at - told < 0.1
            house.load("m")


def test_listings_stay_quick_while_a_load_runs(house: House, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    path = house.model("slow", Script(gate=str(gate.path)))
    house.http.post("/models/load", {"model_id": "slow", "source": str(path)})
    run(gate.reached())
    took = []
    for _ in range(50):
        start = time.perf_counter()
        house.http.get("/models")
        took.append(time.perf_counter() - start)
    assert sorted(took)[25] < 0.01
    gate.open()
    house.until("slow", status="loaded")


def test_a_caller_that_hangs_up_does_not_end_the_load(house: House, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    path = house.model("m", Script(gate=str(gate.path)))
    with pytest.raises(TimeoutError):
        house.http.request("POST", "/models/load?wait=true", json={"model_id": "m", "source": str(path)}, timeout_s=0.3)
    run(gate.reached())
    gate.open()
    house.until("m", status="loaded")
    assert loads_of(path) == 1


@pytest.mark.parametrize("path", ["/models/a/b.c/endpoint", "/models/a%2Fb.c/endpoint", "/models/a%2fb%2Ec/endpoint"])
def test_an_id_with_slashes_is_found_however_it_is_written(house: House, path: str) -> None:
    house.load("a/b.c")
    assert house.http.get(path).json() == {"url": house.daemon.url}


def test_an_id_that_ends_like_the_path_is_an_id(house: House) -> None:
    house.load("x/endpoint")
    assert house.http.get("/models/x/endpoint/endpoint").status == 200
    assert house.http.get("/models/x/endpoint").status == 404


def test_what_is_on_disk_is_listed_and_says_how_to_have_it(house: House) -> None:
    house.model("shelf")
    house.http.post("/models/load", {"model_id": "other", "source": str(house.model("other"))})
    house.until("other", status="loaded")
    deadline = time.monotonic() + 20
    while not any(it["id"] == "shelf" for it in house.http.get("/models").json()):
        assert time.monotonic() < deadline
    assert house.entry("shelf")["status"] == "unloaded"
    answer = house.ask("shelf")
    assert answer.status == 503
    assert answer.json()["error"]["loading"]["state"] == "unloaded"
    not_loaded = house.http.get("/models/shelf/endpoint")
    assert (not_loaded.status, not_loaded.json()["error"]["code"]) == (409, "not_loaded")


def test_a_load_that_fails_says_why_and_so_does_the_listing(house: House) -> None:
    path = house.model("bad", Script(fail="the engine says no"))
    answer = house.http.post("/models/load?wait=true", {"model_id": "bad", "source": str(path)})
    assert answer.status == 503
    assert answer.json()["error"]["code"] == "load_failed"
    assert "the engine says no" in answer.json()["error"]["message"]
    assert "the engine says no" in house.entry("bad")["error"]
    assert house.ask("bad").json()["error"]["code"] == "load_failed"


def test_more_than_fits_is_refused_with_figures(house: House) -> None:
    house.load("half", Script(needs_mb=600))
    path = house.model("other", Script(needs_mb=600))
    order = {"model_id": "other", "source": str(path)}
    now = house.http.post("/models/load", order)
    assert (now.status, now.json()["error"]["code"]) == (409, "insufficient_memory")
    assert now.json()["error"]["need_mb"] == 600
    assert now.json()["error"]["free_mb"] < 600
    never = house.http.post("/models/load", {**order, "source": str(house.model("huge", Script(needs_mb=2000)))})
    assert never.status == 422
    estimate = house.http.post("/models/estimate", order).json()
    assert estimate["fits"] is False
    assert estimate["why"]


def test_requests_beyond_the_slots_wait_their_turn(house: House) -> None:
    house.load("one", Script(slots=1))
    with house.http.stream("POST", CHAT, json={"model": "one", "do": "stall", "stream": True}) as streamed:
        first(streamed)
        queued = Streaming(house, "one")
        assert house.until("one", queued_requests=1)["active_requests"] == 1
    assert queued.answer().status == 200
    house.until("one", queued_requests=0, active_requests=0)


def test_a_client_that_leaves_the_queue_leaves_nothing_there(house: House) -> None:
    house.load("one", Script(slots=1))
    with house.http.stream("POST", CHAT, json={"model": "one", "do": "stall", "stream": True}) as streamed:
        first(streamed)
        with pytest.raises(TimeoutError):
            house.http.request("POST", CHAT, json={"model": "one"}, timeout_s=0.3)
        house.until("one", queued_requests=0, active_requests=1)
    assert house.until("one", active_requests=0)["queued_requests"] == 0
    assert house.ask("one").status == 200


def test_an_engine_that_dies_ends_the_request_with_an_error_and_comes_back(house: House) -> None:
    house.load("m")
    with Events(house.daemon) as events:
        answer = house.ask("m", do="die")
        assert answer.status in (502, 503)
        assert answer.json()["error"]["code"] in ("upstream_error", "model_loading")
        _, died = events.wait_for(type="model", id="m", status="recovering")
        assert "exit code 7" in died["error"]
        events.wait_for(type="model", id="m", status="loaded", after=died["seq"])
    assert house.ask("m").status == 200
    assert house.entry("m")["active_requests"] == 0


def test_an_engine_that_lies_is_an_upstream_error(house: House) -> None:
    house.load("m")
    answer = house.ask("m", do="lie")
    assert answer.status == 502
    assert answer.json()["error"]["code"] == "upstream_error"
    assert house.entry("m")["active_requests"] == 0


@both
def test_a_host_that_stands_still_is_a_timeout(tmp_path: Path, isolation: str) -> None:
    with started(tmp_path, f'isolation = "{isolation}"\n[timeouts]\nstall_s = 1.5') as house:
        house.load("m")
        with house.http.stream("POST", CHAT, json={"model": "m", "do": "stall", "stream": True}) as streamed:
            rest = list(first(streamed))
        assert rest[-1]["error"]["code"] == "upstream_timeout"
        assert "[DONE]" not in rest
        house.until("m", active_requests=0)


@both
def test_a_drain_refuses_the_new_and_the_queued_and_cuts_what_takes_too_long(tmp_path: Path, isolation: str) -> None:
    with started(tmp_path, f'isolation = "{isolation}"') as house:
        drains(house)


def drains(house: House) -> None:
    house.load("one", Script(slots=1))
    daemon = house.daemon
    with Events(daemon) as events:
        running = hosts(daemon)
        with house.http.stream("POST", CHAT, json={"model": "one", "do": "stall", "stream": True}) as streamed:
            rest = first(streamed)
            queued = Streaming(house, "one")
            house.until("one", queued_requests=1)
            daemon.process.send_signal(signal.SIGTERM)
            _, told = events.wait_for(type="draining")
            assert told["draining"] is True
            for refused in (
                queued.answer(),
                house.ask("one"),
                house.http.post("/models/load", {"model_id": "other", "source": str(house.model("other"))}),
            ):
                assert refused.status == 503
                assert refused.json()["error"]["code"] == "shutting_down"
                assert int(refused.headers["retry-after"]) > 0
            assert house.http.get("/health").json()["status"] == "draining"
            cut = list(rest)
        assert cut[-1]["error"]["code"] == "shutting_down"
        assert daemon.process.wait(15) == 0
        assert events.ended()
    assert not any(process.is_running() for process in running)
    assert not list(daemon.runtime.glob("*/*"))
    assert "Traceback" not in daemon.log


def test_a_daemon_that_is_killed_leaves_no_host(house: House) -> None:
    house.load("m")
    running = hosts(house.daemon)
    assert running
    house.daemon.process.kill()
    _, alive = psutil.wait_procs(running, timeout=10)
    assert not alive


def test_defrag_tells_before_and_after_and_not_while_in_use(house: House) -> None:
    house.load("m")
    with house.http.stream("POST", CHAT, json={"model": "m", "do": "stall", "stream": True}) as streamed:
        first(streamed)
        busy = house.http.post("/defrag", {})
        assert (busy.status, busy.json()["error"]["active_requests"]) == (409, 1)
    house.until("m", active_requests=0)
    done = house.http.post("/defrag", {}).json()
    assert done["before"][0]["vram_free_mb"] > 0
    assert done["after"][0]["vram_free_mb"] > 0


def test_only_a_caller_on_this_machine_may_name_any_path(tmp_path: Path) -> None:
    own = next(
        (
            a.address
            for nic in psutil.net_if_addrs().values()
            for a in nic
            if a.family == socket.AF_INET and not a.address.startswith("127.")
        ),
        None,
    )
    if own is None:
        pytest.skip("this machine has no address but loopback")
    with started(tmp_path, 'host = "0.0.0.0"') as house:
        port = house.daemon.url.rpartition(":")[2]
        outside = write_model(tmp_path / "outside.gguf")
        inside = house.model("inside")
        local, remote = Http(f"http://127.0.0.1:{port}"), Http(f"http://{own}:{port}")
        for path in ("/models/load", "/models/estimate"):
            for field in ("source", "draft", "projector"):
                refused = remote.post(path, {"model_id": "m", "source": str(inside), field: str(outside)})
                assert refused.status == 403, field
                assert "allowed_roots" in refused.json()["error"]["message"]
        assert remote.post("/models/load?wait=true", {"model_id": "in", "source": str(inside)}).status == 200
        assert local.post("/models/load?wait=true", {"model_id": "out", "source": str(outside)}).status == 200
        assert "anybody in this network" in house.daemon.log
