"""Our torch engine beside transformers and vllm: decode and prefill speed, SmolLM2-135M, on the cores given.

    python -m bench.peers --model FOLDER [--rounds 7] [--streams 1,4,8] [--prompt 512] [--tokens 32]
        [--sides helexa-f32,transformers-f32] [--vllm-python /venv/bin/python] [--cores 0,1] [--quiet 0.2]
        [--processor]

FOLDER holds SmolLM2 as safetensors (the tests make one in ~/.cache/helexa-tests). Each side is a process that has
loaded the model and is frozen while another computes. Rounds are interleaved and the order of the sides changes with
each; ratios are taken within a round, and shown as their median with the middle half.

Decode: all streams at once, from prompts of 32 tokens; the time for one token is taken off the time for 1 + TOKENS.
Prefill: one prompt and one token. A round in which other processes took more than --quiet cores is taken again, at
most --retries times; what is left in is told.

--processor counts processor time in place of time: for a machine that does other things too. Give it one core, as
threads that wait for each other spin.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from bench.measure import CACHE, machine, spread, table

SHORT = 32


class Peer:
    """A side's process: runs only inside `ask`."""

    def __init__(self, kind: str, python: str, given: argparse.Namespace) -> None:
        self.kind = kind
        self._clock = "processor_s" if given.processor else "wall_s"
        threads = str(len(given.cores.split(",")))
        self._log = (CACHE / f"peer-{kind}.log").open("w")
        self._process = subprocess.Popen(
            ["taskset", "-c", given.cores, python, Path(__file__).with_name("side.py"), kind, given.model, threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )
        self.settings = self._read()["settings"]
        self.freeze()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **task: Any) -> float:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        print(json.dumps(task), file=self._process.stdin, flush=True)
        seconds: float = self._read()[self._clock]
        self.freeze()
        return seconds

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.kind} ended; {self._log.name} says why")
        return json.loads(line)


def measure(peer: Peer, what: str, streams: int, given: argparse.Namespace, seed: int) -> float:
    """Tokens a second."""
    if what == "prefill":
        return float(given.prompt / peer.ask(streams=1, prompt=given.prompt, tokens=1, seed=seed))
    first = peer.ask(streams=streams, prompt=SHORT, tokens=1, seed=seed)
    whole = peer.ask(streams=streams, prompt=SHORT, tokens=1 + given.tokens, seed=seed + 1)
    return streams * float(given.tokens) / max(1e-9, whole - first)


def busy_elsewhere(before: tuple[float, ...], after: tuple[float, ...]) -> float:
    """Cores that were taken by others; (all busy seconds, ours, wall)"""
    return (after[0] - before[0] - (after[1] - before[1])) / (after[2] - before[2])


def now(peer: Peer) -> tuple[float, float, float]:
    times = psutil.cpu_times()
    ours = time.process_time() + sum(psutil.Process(peer.pid).cpu_times()[:2])
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice, ours, time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", default="1,4,8")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--sides", default="helexa-f32,helexa-bf16,helexa-int8,transformers-f32")
    parser.add_argument("--vllm-python")
    parser.add_argument("--cores", default="0,1")
    parser.add_argument("--quiet", type=float, default=0.2)
    parser.add_argument("--retries", type=int, default=3)
    parser.add_argument("--processor", action="store_true")
    given = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    sides = given.sides.split(",") + (["vllm-f32"] if given.vllm_python else [])
    peers: list[Peer] = []
    try:
        for side in sides:
            python = given.vllm_python if side.startswith("vllm") else sys.executable
            peers += [Peer(side, python, given)]
        run(peers, given)
    finally:
        for peer in peers:
            peer.close()


def run(peers: list[Peer], given: argparse.Namespace) -> None:
    cases = [("prefill", 1), *(("decode", int(n)) for n in given.streams.split(","))]
    seen: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    disturbed: list[float] = []
    for peer in peers:
        measure(peer, "decode", 2, given, 0)  # what is made at the first call
    for n in range(given.rounds):
        for case in cases:
            for peer in peers[n % len(peers) :] + peers[: n % len(peers)]:
                for _ in range(1 + given.retries):
                    before = now(peer)
                    speed = measure(peer, *case, given, seed=1000 + 10 * n)
                    others = busy_elsewhere(before, now(peer))
                    if others <= given.quiet:
                        break
                disturbed.append(others)
                seen[case][peer.kind].append(speed)
    of = " of processor time" if given.processor else ""
    print(f"{machine()}; cores {given.cores}; {given.rounds} rounds; tok/s{of}, median (least to greatest)")
    for peer in peers:
        print(f"- {peer.kind}: {peer.settings}")
    loud = sum(share > given.quiet for share in disturbed)
    print(f"others took {spread(disturbed, 2)} cores; {loud} of {len(disturbed)} measurements over {given.quiet:g}")
    ours = peers[0].kind
    rows = []
    for case, by_side in seen.items():
        for kind, speeds in by_side.items():
            ratios = [a / b for a, b in zip(by_side[ours], speeds, strict=True)]
            ratio = "" if kind == ours else quartiles(ratios)
            rows.append([f"{case[0]} x{case[1]}", kind, spread(speeds), ratio])
    table(["", "side", "tok/s", f"{ours} against it"], rows)


def quartiles(ratios: list[float]) -> str:
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
