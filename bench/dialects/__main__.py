"""What translating a stream costs.

    python -m bench.dialects [--rounds 5] [--streams 64] [--skip-litellm]

Two tables. The translator alone: CPU of one chunk in this process, one event a read. The whole gateway: cortex on core
0, a node and the load on core 1; a mix of reasoning, text and tool arguments, one delta a read at 5 ms; the same stream
as it comes, as Anthropic's events and as those of Responses, and LiteLLM's proxy for the same where it is installed
(bench/gateway does that).
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
from typing import Final

from bench.dialects import node
from bench.gateway.proxies import PEERS, PROXIES
from bench.measure import Tree, free_port, machine, running, spread, table, wait_for_port
from helexa.core.dialects import anthropic_request, ollama_request, responses_request
from helexa.core.dialects.anthropic_sinks import EventWriter as MessageEvents
from helexa.core.dialects.anthropic_stream import Answer as MessageAnswer
from helexa.core.dialects.ollama_stream import Answer as OllamaAnswer
from helexa.core.dialects.ollama_stream import Clocks, Lines
from helexa.core.dialects.responses_document import Document
from helexa.core.dialects.responses_sinks import EventWriter as ResponseEvents
from helexa.core.dialects.responses_stream import Answer as ResponseAnswer
from helexa.core.relay.contract import Mend

GAP_MS = 5
KEY = f"sk-{secrets.token_hex(32)}"  # LiteLLM starts with a key of its own only; cortex takes any
CHUNKS = 20_000
REQUESTS = 200
KINDS = ("chat", "messages", "responses")


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m bench.dialects")
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--streams", type=int, default=64)
    args.add_argument("--skip-litellm", action="store_true")
    given = args.parse_args()
    print(f"{machine()}\n{given.rounds} rounds; median (least to greatest)\n")
    print("The translator alone, CPU\n")
    table(["what", "messages, µs", "responses, µs", "ollama, µs"], alone(given.rounds))
    print(f"\nThe whole gateway: {given.streams} streams of {node.DELTAS} deltas, {GAP_MS} ms apart\n")
    names = ["cortex"] if given.skip_litellm or not (PEERS / "done").exists() else ["cortex", "litellm"]
    through(names, given.rounds, given.streams)


# the translator alone


def alone(rounds: int) -> list[list[str]]:
    kinds = {kind: _unchunked(data).replace(node.TIME.encode(), b" of the words") for kind, data in node.MADE.items()}
    rows = []
    for kind, data in kinds.items():
        costs = [
            spread([_of_a_chunk(answer, data, kind) for _ in range(rounds)], 2)
            for answer in (_messages, _responses, _ollama)
        ]
        rows.append([f"a chunk of {kind}", *costs])
    agents: list[tuple[bytes, Callable[[bytes], object]]] = [
        (_agents_messages(), anthropic_request.translate),
        (_agents_response(), _translate_response),
        (_agents_ollama(), ollama_request.chat),
    ]
    size = ", ".join(str(len(body) >> 10) for body, _ in agents)
    costs = [spread([_of_a_request(how, body) for _ in range(rounds)], 0) for body, how in agents]
    rows.append([f"a request of {size} kB with 24 tools", *costs])
    return rows


def _unchunked(data: bytes) -> bytes:
    return data.partition(b"\r\n")[2][:-2]


def _messages() -> Mend:
    return MessageAnswer(MessageEvents(message_id="msg_1", model="stub"), message_id="msg_1", max_tokens=100)


def _responses() -> Mend:
    document = Document(key="hx1", model="stub", created_at=1, echo=b'"tools":[]', clock=time.time, show_summary=True)
    return ResponseAnswer(ResponseEvents(document), called={})


def _ollama() -> Mend:
    clocks = Clocks(started=0.0, sent=0.0, now=time.monotonic, wall=time.time)
    return OllamaAnswer(Lines(model="stub", is_chat=True, clocks=clocks), clocks)


def _of_a_chunk(begin: Callable[[], Mend], data: bytes, kind: str) -> float:
    answer = begin()
    answer.feed(_unchunked(node.CALL) if kind == "arguments" else data)
    return _cpu_us(lambda: answer.feed(data), CHUNKS)


def _of_a_request(translate: Callable[[bytes], object], body: bytes) -> float:
    return _cpu_us(lambda: translate(body), REQUESTS)


def _translate_response(body: bytes) -> object:
    return responses_request.translate(responses_request.read(body), body)


def _cpu_us(what: Callable[[], object], times: int) -> float:
    began = time.process_time_ns()
    for _ in range(times):
        what()
    return (time.process_time_ns() - began) / 1000 / times


TOOL: Final = {
    "type": "object",
    "properties": {f"argument_{n}": {"type": "string", "description": "x" * 180} for n in range(10)},
}


def _agents_messages() -> bytes:
    """The size and shape of Claude Code's first request."""
    tools = [{"name": f"tool_{n}", "description": "d" * 400, "input_schema": TOOL} for n in range(24)]
    system = [{"type": "text", "text": "s" * 4000, "cache_control": {"type": "ephemeral"}} for _ in range(3)]
    messages = [{"role": "user", "content": [{"type": "text", "text": "u" * 500}]}]
    body = {"model": "m", "max_tokens": 32000, "stream": True, "system": system, "tools": tools, "messages": messages}
    return json.dumps(body).encode()


def _agents_ollama() -> bytes:
    """As large, in Ollama's form."""
    tools = [
        {"type": "function", "function": {"name": f"tool_{n}", "description": "d" * 400, "parameters": TOOL}}
        for n in range(24)
    ]
    messages = [{"role": "system", "content": "s" * 12000}, {"role": "user", "content": "u" * 500}]
    return json.dumps({"model": "m", "messages": messages, "tools": tools, "options": {"temperature": 0}}).encode()


def _agents_response() -> bytes:
    """The same of Codex, whose tools stand in namespaces; as large, so that the two can be compared."""
    tools = [
        {"type": "function", "name": f"tool_{n}", "description": "d" * 400, "parameters": TOOL, "strict": False}
        for n in range(24)
    ]
    spaces = [{"type": "namespace", "name": f"space_{n}", "description": "d", "tools": tools[n::3]} for n in range(3)]
    items = [{"role": "developer", "content": [{"type": "input_text", "text": "s" * 4000}]} for _ in range(3)]
    items += [{"role": "user", "content": [{"type": "input_text", "text": "u" * 500}]}]
    body = {"model": "m", "stream": True, "store": False, "tools": spaces, "input": items}
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
                    for kind in KINDS if n % 2 else reversed(KINDS):
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
        row = [f"{name} {PROXIES[name].version()}"]
        for kind in KINDS:
            spent, chat = cost[name, kind], cost[name, "chat"]
            ratio = f"{statistics.median(spent) / statistics.median(chat):.2f}" if spent and chat else "-"
            row += [spread(spent), *([ratio] if kind != "chat" else []), spread(late[name, kind])]
        rows.append(row)
    heads = [[f"{kind}, µs a chunk", *(["ratio"] if kind != "chat" else []), "late p99, ms"] for kind in KINDS]
    table(["gateway", *(head for group in heads for head in group)], rows)


def _load(port: int, kind: str, streams: int, rounds: int) -> dict[str, float]:
    command = ["taskset", "-c", "1", sys.executable, "-m", "bench.dialects.load", KEY, str(port), kind]
    said = subprocess.run(
        [*command, str(streams), str(rounds)], capture_output=True, text=True, check=True, timeout=300
    )
    found: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return found


def _settle(port: int, tree: Tree) -> None:
    for _ in range(60):
        if all(not _load(port, kind, 1, 1)["errors"] for kind in KINDS):
            return
        time.sleep(0.5)
    raise SystemExit(f"no right answer on port {port}: {tree.log.read_text(errors='replace')[-2000:]}")


if __name__ == "__main__":
    main()
