"""How soon our programs answer, and what they take when nobody asks for anything.

    python -m bench.startup [--rounds 15]

Memory is Rss (pages shared with others counted whole) and Pss (counted in shares) of the program's own process; a
node's host processes are apart. "answers" is from the start of the process to the first 200 of `GET /health`.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.measure import Tree, free_port, machine, memory_mb, running, scratch, spread, table
from bench.models import smollm2
from bench.nodes import OURS, Program, cortex, neuron, versions

BIN: Final = Path(sys.executable).parent
ENV: Final = {**os.environ, "PYTHONPATH": OURS}
SETTLE_S: Final = 5.0


def help_s(program: str) -> float:
    started = time.perf_counter()
    subprocess.run([BIN / program, "--help"], check=True, stdout=subprocess.DEVNULL, env=ENV)
    return time.perf_counter() - started


def answers_s(command: list[str | Path], port: int, cores: str, log: Path) -> float:
    """From nothing to the first 200."""
    started = time.perf_counter()
    with running(command, cores=cores, log=log, env=ENV) as tree:
        answered = first_200(tree, port)
    return answered - started


def first_200(tree: Tree, port: int) -> float:
    end = time.perf_counter() + 30
    while time.perf_counter() < end:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                if client.recv(64).startswith(b"HTTP/1.1 200"):
                    return time.perf_counter()
        except OSError:
            pass
        time.sleep(0.002)
    raise SystemExit(f"no answer on port {port}:\n{tree.log.read_text(errors='replace')[-2000:]}")


@contextmanager
def silent_node() -> Iterator[int]:
    """A port where connections are made and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        port: int = server.getsockname()[1]
        yield port


def serve_cortex(folder: Path, port: int, node_port: int | None) -> list[str | Path]:
    config = folder / "cortex.toml"
    text = f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:0"\n'
    if node_port is not None:
        text += f'[[neurons]]\nname = "node"\nendpoint = "http://127.0.0.1:{node_port}"\n'
    config.write_text(text)
    return [BIN / "cortex", "serve", "--config", config]


def idle(program: Program) -> list[str]:
    time.sleep(SETTLE_S)
    pid = program.tree.process.pid  # taskset became the program
    return [f"{memory_mb(pid, kind):.1f}" for kind in ("Rss", "Pss")]


def idle_memory(folder: Path, cores: str) -> list[list[str]]:
    rows = []
    with neuron(folder, cores=cores) as node:
        node.load("smollm2", source=str(smollm2()), context=2048, slots=2, threads=2)
        with cortex(folder, node, cores=cores) as gateway:
            ask = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
            gateway.ask("POST", "/v1/chat/completions", ask)
            rows.append(["cortex, one node, one request served", *idle(gateway)])
            rows.append(["neuron, a model loaded, one request served", *idle(node)])
            hosts = sum([memory_mb(pid) for pid in node.hosts()])
            rows.append(["its hosts (SmolLM2, and the spare)", "", f"{hosts:.1f}"])
            node.unload("smollm2")
            rows.append(["neuron, the model unloaded", *idle(node)])
    with neuron(folder, cores=cores) as node:
        rows.append(["neuron, just started", *idle(node)])
        with cortex(folder, node, cores=cores, models=False) as gateway:
            rows.append(["cortex, just started", *idle(gateway)])
    return rows


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m bench.startup")
    args.add_argument("--rounds", type=int, default=15)
    args.add_argument("--cores", default="0,1")
    given = args.parse_args()

    folder = scratch()
    seen: dict[str, list[float]] = defaultdict(list)
    with silent_node() as silent:
        for _ in range(given.rounds):
            for program in ("cortex", "neuron"):
                seen[f"{program} --help"].append(help_s(program))
            for what, node_port in (("no node", None), ("a node that says nothing", silent)):
                port = free_port()
                command = serve_cortex(folder, port, node_port)
                seen[f"cortex serve answers, {what}"].append(answers_s(command, port, given.cores, folder / "log"))
            port = free_port()
            command = [BIN / "neuron", "serve", "--port", str(port)]
            seen["neuron serve answers"].append(answers_s(command, port, given.cores, folder / "log"))
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    memory = idle_memory(folder, given.cores)
    print(f"{machine()}\n{versions()}; {given.rounds} rounds, median (least to greatest)\n")
    table(["from the start", "seconds"], [[what, spread(times, 3)] for what, times in seen.items()])
    print()
    table([f"idle for {SETTLE_S:.0f} s", "Rss, MB", "Pss, MB"], memory)


if __name__ == "__main__":
    main()
