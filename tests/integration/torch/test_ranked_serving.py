"""A model over two ranks, served by a real daemon: its answers are one rank's, and whatever happens to a rank, its
clients are told, no process is left, and the model comes back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'helexa[torch]'")

from tests.helpers import safetensors_models as models
from tests.helpers.neuron_daemon import Daemon, Events, neuron

GONE_S = 5.0
NO_END = {"2": -100}  # the model's end of a text


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("ranked")
    with neuron(folder, module="tests.helpers.impatient_neuron") as running:
        yield running


@pytest.fixture(scope="module")
def events(daemon: Daemon) -> Iterator[Events]:
    with Events(daemon) as seen:
        yield seen


def load(daemon: Daemon, model: str, **profile: Any) -> None:
    source = str(models.random_model("llama"))
    request = {"model_id": model, "source": source, "threads": 2, "context": 512, **profile}
    reply = daemon.http.post("/models/load?wait=true", request)
    assert reply.status == 200, reply.text


def ask(daemon: Daemon, model: str, tokens: int = 24) -> str:
    reply = daemon.http.post("/v1/completions", body(model, tokens))
    assert reply.status == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


def body(model: str, tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": "The rank in the",
        "max_tokens": tokens,
        "temperature": 0,
        "logit_bias": NO_END,
    }


def processes(daemon: Daemon) -> tuple[psutil.Process, list[psutil.Process]]:
    """The host that has ranks, and its ranks."""
    for host in psutil.Process(daemon.process.pid).children():
        ranks = [child for child in host.children() if "--worker" in child.cmdline()]
        if ranks:
            return host, ranks
    raise AssertionError("no host has ranks")


def wait_for(true: Callable[[], bool], within_s: float = GONE_S) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def split(daemon: Daemon, events: Events) -> str:
    load(daemon, "two", tensor_parallel=2)
    return "two"


def test_two_ranks_answer_as_one_does(daemon: Daemon, split: str) -> None:
    load(daemon, "one")
    try:
        assert ask(daemon, split) == ask(daemon, "one")
    finally:
        daemon.http.post("/models/unload", {"model_id": "one"})


def test_the_ranks_memory_is_the_models(daemon: Daemon, split: str) -> None:
    host, ranks = processes(daemon)
    assert len(ranks) == 1
    info = next(info for info in daemon.http.get("/models").json() if info["id"] == split)
    rss_mb = sum(process.memory_info().rss for process in (host, *ranks)) >> 20
    assert info["vram_used_mb"] >= rss_mb * 0.8


@pytest.mark.parametrize(
    ("number", "within_s", "reason"),
    [(signal.SIGKILL, GONE_S, "rank 1 ended (SIGKILL)"), (signal.SIGSTOP, GONE_S + 5, "the engine stood still")],
    ids=["dies", "stands still"],
)
def test_a_rank_that_fails_in_a_stream_ends_it_and_the_model_comes_back(
    daemon: Daemon, events: Events, split: str, number: int, within_s: float, reason: str
) -> None:
    before = ask(daemon, split)
    host, ranks = processes(daemon)
    after = events.seen[-1][1]["seq"]
    pieces: list[Any] = []
    with daemon.http.stream("POST", "/v1/completions", json=body(split, 450) | {"stream": True}) as response:
        stream = response.events()
        pieces.append(next(stream))
        os.kill(ranks[0].pid, number)
        began = time.monotonic()
        try:
            pieces += stream
        except OSError:
            pass  # cut where no event fitted
    wait_for(lambda: not any(process.is_running() for process in (host, *ranks)), within_s)
    assert time.monotonic() - began < within_s
    assert not any(piece.get("choices") and piece["choices"][0].get("finish_reason") for piece in pieces)
    _, recovering = events.wait_for(after=after, type="model", id=split, status="recovering")
    assert reason in recovering["error"]
    events.wait_for(after=recovering["seq"], type="model", id=split, status="loaded")
    assert ask(daemon, split) == before


def test_an_unload_leaves_no_rank(daemon: Daemon, split: str) -> None:
    host, ranks = processes(daemon)
    assert daemon.http.post("/models/unload", {"model_id": split}).status == 200
    assert not any(process.is_running() for process in (host, *ranks))
