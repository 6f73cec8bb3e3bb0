"""What translating a stream costs.

    python -m bench.dialects [--rounds 5] [--streams 64] [--skip-litellm]

Two tables. The translator alone: CPU of one chunk in this process, one event a read. The whole gateway: cortex on core
0, a node and the load on core 1; a mix of reasoning, text and tool arguments, one delta a read at 5 ms; the same stream
as it comes and as Anthropic's events, and LiteLLM's proxy for the same where it is installed (bench/gateway does that).
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from bench.dialects import node
from bench.gateway.proxies import PEERS, PROXIES
from bench.measure import Tree, free_port, machine, running, spread, table, wait_for_port
from helexa.core.dialects.anthropic_request import translate
from helexa.core.dialects.anthropic_sinks import EventWriter
from helexa.core.dialects.anthropic_stream import Answer

GAP_MS = 5
KEY = f"sk-{secrets.token_hex(32)}"  # LiteLLM starts with a key of its own only; cortex takes any
CHUNKS = 20_000
REQUESTS = 200


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m bench.dialects")
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--streams", type=int, default=64)
    args.add_argument("--skip-litellm", action="store_true")
    given = args.parse_args()
    print(f"{machine()}\n{given.rounds} rounds; median (least to greatest)\n")
    print("The translator alone, CPU\n")
    table(["what", "µs"], alone(given.rounds))
    print(f"\nThe whole gateway: {given.streams} streams of {node.DELTAS} deltas, {GAP_MS} ms apart\n")
    names = ["cortex"] if given.skip_litellm or not (PEERS / "done").exists() else ["cortex", "litellm"]
    through(names, given.rounds, given.streams)


# the translator alone


def alone(rounds: int) -> list[list[str]]:
    kinds = {kind: _unchunked(data).replace(node.TIME.encode(), b" of the words") for kind, data in node.MADE.items()}
    rows = []
    for kind, data in kinds.items():
        rows.append([f"a chunk of {kind}", spread([_of_a_chunk(data, kind) for _ in range(rounds)], 2)])
    agent = _agents_request()
    rows.append(
        [f"a request of {len(agent) >> 10} kB with 24 tools", spread([_of_a_request(agent) for _ in range(rounds)], 0)]
    )
    return rows


def _unchunked(data: bytes) -> bytes:
    return data.partition(b"\r\n")[2][:-2]


def _of_a_chunk(data: bytes, kind: str) -> float:
    answer = Answer(EventWriter(message_id="msg_1", model="stub"), message_id="msg_1", max_tokens=100)
    answer.feed(_unchunked(node.CALL) if kind == "arguments" else data)
    return _cpu_us(lambda: answer.feed(data), CHUNKS)


def _of_a_request(body: bytes) -> float:
    return _cpu_us(lambda: translate(body), REQUESTS)


def _cpu_us(what: Callable[[], object], times: int) -> float:
    began = time.process_time_ns()
    for _ in range(times):
        what()
    return (time.process_time_ns() - began) / 1000 / times


def _agents_request() -> bytes:
    """The size and shape of Claude Code's first request."""
    schema = {
        "type": "object",
        "properties": {f"argument_{n}": {"type": "string", "description": "x" * 180} for n in range(10)},
    }
    tools = [{"name": f"tool_{n}", "description": "d" * 400, "input_schema": schema} for n in range(24)]
    system = [{"type": "text", "text": "s" * 4000, "cache_control": {"type": "ephemeral"}} for _ in range(3)]
    messages = [{"role": "user", "content": [{"type": "text", "text": "u" * 500}]}]
    body = {"model": "m", "max_tokens": 32000, "stream": True, "system": system, "tools": tools, "messages": messages}
    return json.dumps(body).encode()


# the whole gateway


def through(names: list[str], rounds: int, streams: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="helexa-bench-"))
    cost: dict[tuple[str, str], list[float]] = defaultdict(list)
    late: dict[tuple[str, str], list[float]] = defaultdict(list)
    node_port = free_port()
    command = [sys.executable, "-m", "bench.dialects.node", str(node_port), str(GAP_MS)]
    with running(command, cores="1", log=folder / "node.log") as stub:
        wait_for_port(node_port, stub)
        trees: dict[str, tuple[Tree, int]] = {}
        try:
            for name in names:
                port = free_port()
                (folder / name).mkdir()
                tree = Tree(
                    PROXIES[name].command(port, node_port, folder / name),
                    cores="0",
                    log=folder / name / "log",
                    env={"LITELLM_MASTER_KEY": KEY, "LITELLM_USE_CHAT_COMPLETIONS_URL_FOR_ANTHROPIC_MESSAGES": "1"},
                )
                trees[name] = tree, port
                wait_for_port(port, tree, 120)
                _settle(port, tree)
                print(f"{name} is up", file=sys.stderr)
            for tree, _ in trees.values():
                tree.freeze()
            for n in range(rounds):
                for name, (tree, port) in trees.items():
                    side_by_side, times = (streams, 4) if PROXIES[name].load == 1 else (2, 2)
                    tree.thaw()
                    for kind in ("chat", "messages") if n % 2 else ("messages", "chat"):
                        before = tree.cpu_ns()
                        got = _load(port, kind, side_by_side, times)
                        used_us = (tree.cpu_ns() - before) / 1000
                        if got["errors"] or not got["events"]:
                            print(f"{name}, {kind}: {got}", file=sys.stderr)
                            continue
                        cost[name, kind].append(used_us / got["events"])
                        late[name, kind].append(got["p99_ms"])
                    tree.freeze()
        finally:
            for tree, _ in trees.values():
                tree.stop()
    rows = []
    for name in names:
        chat, messages = cost[name, "chat"], cost[name, "messages"]
        ratio = f"{statistics.median(messages) / statistics.median(chat):.2f}" if chat and messages else "-"
        rows.append(
            [
                f"{name} {PROXIES[name].version()}",
                spread(chat),
                spread(late[name, "chat"]),
                spread(messages),
                spread(late[name, "messages"]),
                ratio,
            ]
        )
    table(["gateway", "chat, µs a chunk", "late p99, ms", "messages, µs a chunk", "late p99, ms", "ratio"], rows)


def _load(port: int, kind: str, streams: int, rounds: int) -> dict[str, float]:
    command = ["taskset", "-c", "1", sys.executable, "-m", "bench.dialects.load", KEY, str(port), kind]
    said = subprocess.run(
        [*command, str(streams), str(rounds)], capture_output=True, text=True, check=True, timeout=300
    )
    found: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return found


def _settle(port: int, tree: Tree) -> None:
    for _ in range(60):
        if all(not _load(port, kind, 1, 1)["errors"] for kind in ("chat", "messages")):
            return
        time.sleep(0.5)
    raise SystemExit(f"no right answer on port {port}: {tree.log.read_text(errors='replace')[-2000:]}")


if __name__ == "__main__":
    main()
