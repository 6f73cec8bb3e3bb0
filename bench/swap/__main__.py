"""What a swap is made of: two models take turns on a node that is theirs.

    python -m bench.swap [--rounds 9] [--cores 0,1]

SmolLM2 and Gemma, by turns: unload, until the process is gone and the memory back; load; first token. Once on a node
that keeps a started host waiting (the default), once on one that does not. Beside it, in processes of their own: how
long a host takes to start, to load the same file, and how long the engine alone takes for it. The files are in the
page cache; where they are not, the disk's time comes on top.
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
from pathlib import Path
from typing import Any, Final

import uvloop

from bench.engine.client import Side, ask_at_once
from bench.measure import machine, memory_mb, scratch, spread, table
from bench.models import gemma, smollm2
from bench.nodes import OURS, Program, neuron, versions

CONTEXT: Final = 2048
SLOTS: Final = 2
SETTLED_S: Final = 0.3

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
    head = ["by itself", "host start", "load in a started host", "engine's own load, bare process", "host holds, MB"]
    table(head, rows)


if __name__ == "__main__":
    main()
