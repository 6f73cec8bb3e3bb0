"""What the batch choice costs the prefill, and what it buys: the time in which a client that leaves is noticed.

    python -m bench.batch [--batches 32,64,128,256,512] [--rounds 5] [--tokens 1500] [--cores 0,1]

SmolLM2 on a real node, loaded anew for each batch. Prefill: a prompt of --tokens, its cache off, by the
engine's own figures. Cancel: the same request again, left in the middle of its prefill; from the close of the
connection until the host's process no longer computes (its processor time stands still).
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import time
from collections import defaultdict
from typing import Any, Final

from bench.measure import cpu_ns, machine, scratch, spread, table
from bench.models import smollm2
from bench.nodes import Program, neuron, versions

MODEL: Final = "smollm2"
SENTENCE: Final = (
    "a river carries stones from the hills to the sea and nobody counts how many of them arrive "  # 18 tokens
)
IDLE_S: Final = 0.1  # this long without work is idle
LOOK_S: Final = 0.005
BUSY: Final = 0.1  # of one core, between two looks


def body(tokens: int, *, stream: bool) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": SENTENCE * (tokens // 18)}],
        "max_tokens": 2,
        "temperature": 0,
        "cache_prompt": False,
        "stream": stream,
    }


def prefill(node: Program, tokens: int) -> tuple[float, int]:
    """Tokens a second, and how many there were."""
    timings = node.ask("POST", "/v1/chat/completions", body(tokens, stream=False), timeout_s=900)["timings"]
    return timings["prompt_per_second"], timings["prompt_n"]


def cancel_s(node: Program, host: int, tokens: int, after_s: float, *, stream: bool) -> float:
    """Leave `after_s` into the request; seconds until the host is idle."""
    data = json.dumps(body(tokens, stream=stream)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", node.port)) as client:
        client.sendall(head.encode() + data)
        time.sleep(after_s)
    left = worked = time.perf_counter()
    before = cpu_ns(host)
    while (now := time.perf_counter()) - worked < IDLE_S:
        time.sleep(LOOK_S)
        used = cpu_ns(host)
        if used - before > BUSY * LOOK_S * 1e9:
            worked = now
        before = used
    return worked - left


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m bench.batch")
    args.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[32, 64, 128, 256, 512])
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--tokens", type=int, default=1500, help="of the prompt, about")
    args.add_argument("--cores", default="0,1")
    args.add_argument("--threads", type=int, default=2)
    given = args.parse_args()

    folder = scratch()
    speed: dict[int, list[float]] = defaultdict(list)
    cancels: dict[tuple[int, bool], list[float]] = defaultdict(list)
    tokens = 0
    with neuron(folder, cores=given.cores, toml="spare_host = false") as node:
        for n in range(given.rounds):
            for batch in given.batches:
                profile = {"context": given.tokens + 256, "slots": 1, "threads": given.threads, "batch": batch}
                node.load(MODEL, source=str(smollm2()), **profile)
                (host,) = node.hosts()
                tok_s, tokens = prefill(node, given.tokens)
                speed[batch].append(tok_s)
                for stream in (True, False):
                    seconds = cancel_s(node, host, given.tokens, tokens / tok_s / 4, stream=stream)
                    cancels[batch, stream].append(seconds * 1000)
                node.unload(MODEL)
            print(f"round {n + 1} of {given.rounds} done", file=sys.stderr)

    print(f"{machine()}\n{versions()}, {smollm2().name}")
    print(
        f"prompt of {tokens} tokens, {given.threads} engine threads, cores {given.cores}; "
        f"{given.rounds} rounds, median (least to greatest)\n"
    )
    best = max(statistics.median(seen) for seen in speed.values())
    rows = []
    for batch in given.batches:
        middle = statistics.median(speed[batch])
        rows.append(
            [
                str(batch),
                spread(speed[batch], 0),
                f"{middle / best:.2f}",
                f"{batch / middle * 1000:.0f}",
                spread(cancels[batch, True], 0),
                spread(cancels[batch, False], 0),
            ]
        )
    table(
        ["batch", "prefill tok/s", "of the best", "ms a batch", "streamed: ms until idle", "whole: ms until idle"], rows
    )


if __name__ == "__main__":
    main()
