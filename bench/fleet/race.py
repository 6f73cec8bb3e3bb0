"""Two gateways that know nothing of each other race on one small fleet: real programs, real models, too little memory.

SmolLM2 under six names with six contexts, so that the needs differ; three nodes, of which one has room for the largest
alone, one for two of them, one for three of the small. Clients ask for whichever they like, half of them streaming,
some leave early; each gateway has half of them, until the nodes have begun as many loads as were asked for. Then
everything must be at rest, and each gateway must serve each model.

What is looked at: from each node's own log, the sum of the needs that it held or was loading at any time; from its
/models, several times a second, what it says that its models hold; of each request, its answer.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from random import Random
from typing import Any, Final

from bench.measure import scratch, table
from bench.models import smollm2
from bench.nodes import Program, cortex, neuron, versions

CONTEXTS: Final = {"m0": 512, "m1": 1024, "m2": 2048, "m3": 4096, "m4": 6144, "m5": 8192}
CLIENTS: Final = 10
GONE: Final = 0.1  # of the streams: the client leaves after its first event
LOOK_S: Final = 0.1
ANSWER_S: Final = 600.0
REST_S: Final = 60.0


@dataclass
class Outcome:
    """How the requests ended. lost: what no client can make sense of, in words."""

    whole: int = 0
    left: int = 0
    told: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.whole + other.whole,
            self.left + other.left,
            self.told + other.told,
            self.lost + other.lost,
            self.waits_s + other.waits_s,
        )


class Watched:
    """A node, what it may hold, and what it was seen to hold."""

    def __init__(self, node: Program, limit_mb: int, needs_mb: dict[str, int]) -> None:
        self.node = node
        self.limit_mb = limit_mb
        self.said_mb = 0
        self._needs_mb = needs_mb

    def look(self) -> None:
        status, models = self.node.try_ask("GET", "/models")
        if status == 200:
            self.said_mb = max(self.said_mb, sum(model.get("vram_used_mb") or 0 for model in models))

    def log(self) -> list[dict[str, Any]]:
        text = self.node.tree.log.read_text(errors="replace")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def loads(self) -> int:
        return sum(line.get("event") == "model loading" for line in self.log())

    def held(self) -> tuple[int, int, int]:
        """From the log: most MB and most models at once, and unloads."""
        held: set[str] = set()
        most_mb = most = unloads = 0
        for line in self.log():
            if line.get("event") == "model loading":
                held.add(line["model"])
            elif line.get("event") in ("model unloaded", "model failed"):
                unloads += line["event"] == "model unloaded"
                held.discard(line["model"])
            most_mb = max(most_mb, sum(self._needs_mb[model] for model in held))
            most = max(most, len(held))
        return most_mb, most, unloads


def show(loads: int, seed: int) -> None:
    folder = scratch()
    needs_mb = _needs(folder)
    largest = max(needs_mb.values())
    small = sorted(needs_mb.values())
    limits = (largest + 10, small[2] + small[3] + 10, sum(small[:3]) + 10)
    with _fleet(folder, limits) as (nodes, gateways):
        watched = [Watched(node, limit, needs_mb) for node, limit in zip(nodes, limits, strict=True)]
        started = time.monotonic()
        outcome = _race(watched, gateways, loads, seed)
        took_s = time.monotonic() - started
        restless = _rest(watched, gateways)
        refused = _unserved(gateways)
        _print(watched, gateways, outcome, took_s, restless + refused)


def _needs(folder: Path) -> dict[str, int]:
    """What each takes, as a node says that has all the room."""
    with neuron(folder / "asked", cores="0,1") as node:
        needs = {}
        for model in CONTEXTS:
            devices = node.ask("POST", "/models/estimate", _profile(model))["devices"]
            needs[model] = sum(d["weights_mb"] + d["kv_mb"] + d["overhead_mb"] for d in devices)
        return needs


def _profile(model: str) -> dict[str, Any]:
    return {"model_id": model, "source": str(smollm2()), "context": CONTEXTS[model], "slots": 1, "threads": 1}


@contextmanager
def _fleet(folder: Path, limits: tuple[int, ...]) -> Iterator[tuple[list[Program], list[Program]]]:
    catalogue = "".join(
        "[[models]]\n"
        + "".join(
            f"{'id' if key == 'model_id' else key} = {json.dumps(value)}\n" for key, value in _profile(model).items()
        )
        for model in CONTEXTS
    )
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(neuron(folder / f"n{at}", cores="0,1", toml=f"memory_limit_mb = [{limit}]"))
            for at, limit in enumerate(limits)
        ]
        gateways = [
            stack.enter_context(cortex(folder / f"g{at}", *nodes, cores="0,1", models=False, catalogue=catalogue))
            for at in range(2)
        ]
        yield nodes, gateways


def _race(watched: list[Watched], gateways: list[Program], loads: int, seed: int) -> Outcome:
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            for node in watched:
                node.look()
            if sum(node.loads() for node in watched) >= loads:
                over.set()

    def client(number: int) -> Outcome:
        rng, outcome = Random(f"{seed}/{number}"), Outcome()
        while not over.is_set():
            _ask(gateways[number % 2], rng.choice(list(CONTEXTS)), rng, outcome)
        return outcome

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        watching = pool.submit(watch)
        outcomes = list(pool.map(client, range(CLIENTS)))
        watching.result()
    return sum(outcomes, Outcome())


def _ask(gateway: Program, model: str, rng: Random, outcome: Outcome) -> None:
    stream = rng.random() < 0.5
    leaves = stream and rng.random() < GONE
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell me of the number {rng.randrange(1000)}."}],
        "max_tokens": rng.randint(1, 12),
        "stream": stream,
    }
    connection = HTTPConnection("127.0.0.1", gateway.port, timeout=ANSWER_S)
    began = time.monotonic()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if leaves:
            answer.readline()
            outcome.left += 1
            return
        data = answer.read()
        outcome.waits_s.append(time.monotonic() - began)
        if stream and answer.status == 200:
            _judge_stream(data, model, outcome)
        else:
            _judge(answer.status, answer.getheader("retry-after"), data, model, outcome)
    except (OSError, HTTPException) as err:
        outcome.lost.append(f"{model}: {err!r} after {time.monotonic() - began:.1f} s")
    finally:
        connection.close()


def _judge(status: int, retry_after: str | None, data: bytes, model: str, outcome: Outcome) -> None:
    try:
        said = json.loads(data)
    except ValueError:
        outcome.lost.append(f"{model}: {status} with {data[:80]!r}")
        return
    if status == 200 and said["choices"][0]["finish_reason"] in ("stop", "length"):
        outcome.whole += 1
    elif status == 503 and retry_after and said["error"]["message"]:
        outcome.told[f"503 {said['error']['code']}"] += 1
    else:
        outcome.lost.append(f"{model}: {status} {data[:200]!r}")


def _judge_stream(data: bytes, model: str, outcome: Outcome) -> None:
    events = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
    if events and events[-1] == b"[DONE]":
        outcome.whole += 1
        return
    last = json.loads(events[-1]) if events else {}
    if last.get("error", {}).get("code") in ("load_failed", "model_loading", "overloaded", "no_node"):
        outcome.told[f"event {last['error']['code']}"] += 1
    else:
        outcome.lost.append(f"{model}: a stream that ends with {data[-200:]!r}")


def _rest(watched: list[Watched], gateways: list[Program]) -> list[str]:
    """What is not at rest some time after the last answer."""
    end = time.monotonic() + REST_S
    while True:
        wrong = [
            f"n{at}: {model['id']} is {model['status']} with {model.get('active_requests')} running"
            for at, node in enumerate(watched)
            for model in node.node.ask("GET", "/models")
            if model["status"] not in ("loaded", "unloaded")
            or model.get("active_requests")
            or model.get("queued_requests")
        ]
        there = [{m["id"] for m in node.node.ask("GET", "/models") if m["status"] == "loaded"} for node in watched]
        for at, gateway in enumerate(gateways):
            fleet = gateway.ask("GET", "/fleet")
            if fleet["inflight"]:
                wrong.append(f"gateway {at}: {fleet['inflight']} in flight")
            seen = [{m["id"] for m in node["models"] if m["status"] == "loaded"} for node in fleet["nodes"]]
            if seen != there:
                wrong.append(f"gateway {at} sees {seen} where there are {there}")
        if not wrong or time.monotonic() > end:
            return wrong
        time.sleep(0.2)


def _unserved(gateways: list[Program]) -> list[str]:
    """Each gateway serves each model, one after the other."""
    wrong = []
    for at, gateway in enumerate(gateways):
        for model in CONTEXTS:
            body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
            status, said = gateway.try_ask("POST", "/v1/chat/completions", body, ANSWER_S)
            if status != 200:
                wrong.append(f"gateway {at} does not serve {model} afterwards: {status} {said}")
    return wrong


def _print(watched: list[Watched], gateways: list[Program], outcome: Outcome, took_s: float, wrong: list[str]) -> None:
    print(f"Two gateways, {len(watched)} nodes, {len(CONTEXTS)} models, {CLIENTS} clients; {versions()}:\n")
    rows = []
    for at, node in enumerate(watched):
        most_mb, most, unloads = node.held()
        rows.append(
            [
                f"n{at}",
                f"{node.limit_mb:,}",
                f"{most_mb:,} (<= {node.limit_mb:,})",
                f"{node.said_mb:,} (<= {node.limit_mb:,})",
                str(most),
                str(node.loads()),
                str(unloads),
            ]
        )
        if max(most_mb, node.said_mb) > node.limit_mb:
            wrong.append(f"n{at} held {most_mb} MB by its log, {node.said_mb} by its own words, of {node.limit_mb}")
    table(["", "limit MB", "held at most (log)", "held at most (/models)", "models at once", "loads", "unloads"], rows)
    waits = sorted(outcome.waits_s) or [0.0]
    asked = outcome.whole + outcome.left + sum(outcome.told.values()) + len(outcome.lost)
    print()
    table(
        [
            "seconds",
            "requests",
            "whole answers",
            "told why",
            "client left",
            "lost",
            "wait mean",
            "p50",
            "p99",
            "longest",
        ],
        [
            [
                f"{took_s:.0f}",
                str(asked),
                str(outcome.whole),
                ", ".join(f"{count} x {what}" for what, count in sorted(outcome.told.items())) or "0",
                str(outcome.left),
                f"{len(outcome.lost)} (<= 0)",
                f"{statistics.mean(waits):.2f}",
                f"{waits[len(waits) // 2]:.2f}",
                f"{waits[min(len(waits) - 1, int(len(waits) * 0.99))]:.1f}",
                f"{waits[-1]:.1f}",
            ]
        ],
    )
    print()
    for line in [*outcome.lost, *wrong]:
        print(f"WRONG: {line}")
    if outcome.lost or wrong:
        raise SystemExit(1)
