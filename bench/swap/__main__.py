"""What a swap is made of: two models take turns on a node that is theirs.

    python -m bench.swap [--rounds 9] [--cores 0,1]

SmolLM2 and Gemma, by turns: unload, until the process is gone and the memory back; load; first token. Once on a node
that keeps a started host waiting (the default), once on one that does not. Beside it, in processes of their own: how
long a host takes to start, to load the same file, and how long the engine alone takes for it. Last the whole through a
gateway: a request for the one while the other has the memory, to its first token. The files are in the page cache;
where they are not, the disk's time comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import uvloop

from bench.engine.client import Side, ask_at_once
from bench.measure import machine, memory_mb, scratch, spread, table
from bench.models import gemma, smollm2
from bench.nodes import OURS, Program, cortex, neuron, versions

CONTEXT: Final = 2048
SLOTS: Final = 2
SETTLED_S: Final = 0.3
RESIDENCY_S: Final = 1.0  # a model stays for half its load's time at least

# The engine without any of us but for the options: import, then the load itself.
BARE: Final = """
import json, sys, time
from helexa.neuron.harness.llama.engine import build_params, warm
warm()
spec = json.load(open(sys.argv[1])) | {"socket": sys.argv[2]}
params = build_params(spec)
import xllamacpp
started = time.perf_counter()
server = xllamacpp.Server(params)
print(time.perf_counter() - started, flush=True)
import os
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Swap:
    """Milliseconds, and what the host's process held before it went."""

    load_ms: float
    first_token_ms: float
    unload_ms: float
    held_mb: float


def take_turn(node: Program, model: str, file: Path, threads: int) -> Swap:
    waits_for_spare(node)
    before = set(node.hosts())
    started = time.perf_counter()
    node.load(model, source=str(file), context=CONTEXT, slots=SLOTS, threads=threads)
    loaded = time.perf_counter()
    first_s = first_token_s(node, model)
    waits_for_spare(node)
    host = host_of(node, model, before)
    held = memory_mb(host)
    asked = time.perf_counter()
    node.unload(model)
    while Path(f"/proc/{host}").exists():
        time.sleep(0.0005)
    gone = time.perf_counter()
    return Swap((loaded - started) * 1000, first_s * 1000, (gone - asked) * 1000, held)


def host_of(node: Program, model: str, before: set[int]) -> int:
    """The host that listens on the model's socket: the spare of before, or the one that was not there."""
    socket = node.spec(model)["socket"]
    inode = next(row.split()[6] for row in Path("/proc/net/unix").read_text().splitlines() if row.endswith(socket))
    for pid in node.hosts():
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if os.readlink(fd) == f"socket:[{inode}]":
                    return pid
            except OSError:
                continue
    raise SystemExit(f"no host of {model} listens on {socket}")


def waits_for_spare(node: Program) -> None:
    """Until whatever the node still does in the background is done: no process of its computes any more."""
    quiet_since = time.monotonic()
    before = node.tree.cpu_ns()
    while time.monotonic() - quiet_since < SETTLED_S:
        time.sleep(0.05)
        used = node.tree.cpu_ns()
        if used - before > 5_000_000:
            quiet_since = time.monotonic()
        before = used


def first_token_s(node: Program, model: str) -> float:
    body = {
        "model": model,
        "prompt": "The colours of the rainbow are",
        "stream": True,
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
    }
    (answer,) = uvloop.run(ask_at_once(Side("neuron", port=node.port, path="/v1/completions"), [body]))
    return answer.first_s


def through_gateway(
    folder: Path, files: dict[str, Path], rounds: int, cores: str, threads: int
) -> dict[str, list[dict[str, float]]]:
    """Where the milliseconds of a request go that finds the other model in its place, by model."""
    with neuron(folder / "asked", cores=cores) as asked:
        needs = []
        for model, file in files.items():
            order = {"model_id": model, "source": str(file), "context": CONTEXT, "slots": SLOTS, "threads": threads}
            devices = asked.ask("POST", "/models/estimate", order)["devices"]
            needs.append(sum(d["weights_mb"] + d["kv_mb"] + d["overhead_mb"] for d in devices))
    catalogue = "".join(
        f'[[models]]\nid = "{model}"\nsource = "{file}"\ncontext = {CONTEXT}\nslots = {SLOTS}\nthreads = {threads}\n'
        for model, file in files.items()
    )
    seen: dict[str, list[dict[str, float]]] = defaultdict(list)
    limit = f"memory_limit_mb = [{max(needs) + min(needs) // 2}]"
    with (
        neuron(folder / "behind", cores=cores, toml=limit) as node,
        cortex(folder / "gateway", node, cores=cores, models=False, catalogue=catalogue) as gateway,
    ):
        for n in range(rounds + 1):
            for model in files:
                waits_for_spare(node)
                time.sleep(RESIDENCY_S)
                before = len(log_of(node))
                asked_at = time.time()
                first_s = first_token_s(gateway, model)
                if n:  # the first round fills the caches
                    seen[model].append(parts_of(log_of(node)[before:], model, asked_at, first_s))
    return seen


def parts_of(log: list[dict[str, Any]], model: str, asked_at: float, first_s: float) -> dict[str, float]:
    """From the node's log, which says when a model became what."""
    other = next(line["model"] for line in log if line["event"] == "model unloading")
    marks = {
        "until it unloads": (other, "unloading"),
        "unload": (other, "unloaded"),
        "until it loads": (model, "loading"),
        "load": (model, "loaded"),
    }
    parts, last = {}, asked_at
    for part, (whose, state) in marks.items():
        line = next(line for line in log if line["event"] == f"model {state}" and line["model"] == whose)
        at = datetime.fromisoformat(line["timestamp"]).timestamp()
        parts[part], last = (at - last) * 1000, at
    return {**parts, "first token": (asked_at + first_s - last) * 1000, "in all": first_s * 1000}


def log_of(node: Program) -> list[dict[str, Any]]:
    lines = node.tree.log.read_text(errors="replace").splitlines()
    return [line for line in map(json.loads, (text for text in lines if text.startswith("{"))) if "event" in line]


def by_itself(spec: dict[str, Any], folder: Path) -> tuple[float, float, float]:
    """A host that we start ourselves: ms until it is ready, ms of its load; and ms of the engine's own load."""
    env = {**os.environ, "PYTHONPATH": OURS, "GGML_NO_BACKTRACE": "1"}
    socket = str(folder / "bare.sock")
    started = time.perf_counter()
    command = [sys.executable, "-P", "-m", "helexa.neuron.host", "--parent", str(os.getpid())]
    log = (folder / "bare.log").open("ab")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env) as host:
        assert host.stdin is not None
        assert host.stdout is not None
        until(host, "ready")
        ready = time.perf_counter()
        order = {"op": "load", "harness": "llama", "spec": spec | {"socket": socket}}
        host.stdin.write(json.dumps(order).encode() + b"\n")
        host.stdin.flush()
        until(host, "loaded")
        loaded = time.perf_counter()
        host.stdin.close()  # its daemon is gone: it ends
        host.wait(20)
    (folder / "bare.json").write_text(json.dumps(spec))
    said = subprocess.run(
        [sys.executable, "-c", BARE, str(folder / "bare.json"), str(folder / f"{time.monotonic_ns()}.sock")],
        env=env,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        check=True,
    )
    log.close()
    return (ready - started) * 1000, (loaded - ready) * 1000, float(said.stdout.split()[-1]) * 1000


def until(host: subprocess.Popen[bytes], event: str) -> None:
    assert host.stdout is not None
    for line in host.stdout:
        said = json.loads(line)
        if said["event"] == event:
            return
        if said["event"] == "failed":
            raise SystemExit(f"the host failed: {said['error']}")
    raise SystemExit("the host ended")


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m bench.swap")
    args.add_argument("--rounds", type=int, default=9)
    args.add_argument("--cores", default="0,1")
    args.add_argument("--threads", type=int, default=2)
    given = args.parse_args()

    folder = scratch()
    files = {"smollm2": smollm2(), "gemma": gemma()}
    swaps: dict[tuple[str, bool], list[Swap]] = defaultdict(list)
    alone: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    with (
        neuron(folder / "spare", cores=given.cores) as quick,
        neuron(folder / "none", cores=given.cores, toml="spare_host = false") as plain,
    ):
        for node in (quick, plain):  # the files come into the page cache
            for model, file in files.items():
                take_turn(node, model, file, given.threads)
        for n in range(given.rounds):
            for model, file in files.items():
                for node, spare in ((quick, True), (plain, False)):
                    swaps[model, spare].append(take_turn(node, model, file, given.threads))
                alone[model].append(by_itself(plain.spec(model), folder))
            print(f"round {n + 1} of {given.rounds} done", file=sys.stderr)

    asked = through_gateway(folder, files, given.rounds, given.cores, given.threads)
    print(f"{machine()}\n{versions()}")
    print(
        f"{', '.join(f'{m}: {f.name}, {f.stat().st_size >> 20} MB' for m, f in files.items())}; {SLOTS} slots of "
        f"{CONTEXT} tokens, {given.threads} engine threads, cores {given.cores}; {given.rounds} rounds, ms, median "
        "(least to greatest)\n"
    )
    rows = []
    for (model, spare), seen in swaps.items():
        other = swaps["gemma" if model == "smollm2" else "smollm2", spare]
        whole = statistics.median(s.unload_ms for s in other) + statistics.median(
            s.load_ms + s.first_token_ms for s in seen
        )
        rows.append(
            [
                model,
                "yes" if spare else "no",
                spread([s.unload_ms for s in other], 0),
                spread([s.load_ms for s in seen], 0),
                spread([s.first_token_ms for s in seen], 0),
                f"{whole:.0f}",
            ]
        )
    table(["swap to", "spare host", "unload the other", "load", "first token", "in all"], rows)
    print()
    rows = [
        [
            model,
            *(spread([times[part] for times in seen], 0) for part in range(3)),
            spread([s.held_mb for spare in (True, False) for s in swaps[model, spare]], 0),
        ]
        for model, seen in alone.items()
    ]
    whole = [
        [
            model,
            *(spread([s[part] for s in swaps_seen], 0) for part in swaps_seen[0]),
            spread(beyond(swaps_seen, alone[model]), 0),
        ]
        for model, swaps_seen in asked.items()
    ]
    head = ["by itself", "host start", "load in a started host", "engine's own load, bare process", "host holds, MB"]
    table(head, rows)
    print()
    table(["request for", *next(iter(asked.values()))[0], "beyond the engine's load"], whole)


def beyond(asked: list[dict[str, float]], alone: list[tuple[float, float, float]]) -> list[float]:
    """What a swap takes longer than the median of the engine's own loads."""
    own = statistics.median(times[2] for times in alone)
    return [parts["in all"] - own for parts in asked]


if __name__ == "__main__":
    main()
