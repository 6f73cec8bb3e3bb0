"""What a gateway costs: CPU microseconds per request and per chunk, added latency, memory at a thousand slow streams.

    python -m bench.gateway [--rounds 5] [--only nginx,cortex,...] [--quick]

Every gateway runs on core 0, the stub and the load on core 1; all are up, and all but the one that is measured are
frozen (SIGSTOP), so that nobody pays for another's background work. Rounds are interleaved. CPU is that of the
gateway's whole process tree. Nobody asks for usage; cortex asks for it itself and cuts it out again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from bench.gateway.proxies import PROXIES
from bench.measure import Tree, compiled, free_port, machine, running, spread, table, wait_for_port

HERE = Path(__file__).parent
PATH = "/v1/chat/completions"
KEY = "sk-bench"  # litellm does not start without one; the others do not look at it
AUTH = f"Authorization: Bearer {KEY}"


@dataclass(frozen=True, slots=True)
class Scenario:
    key: str
    body: str
    connections: int
    requests: int


SCENARIOS = [
    Scenario("small x1", "small", 1, 3_000),
    Scenario("small x16", "small", 16, 12_000),
    Scenario("small x64", "small", 64, 12_000),
    Scenario("8k x1", "chat8k", 1, 2_000),
    Scenario("8k x16", "chat8k", 16, 6_000),
    Scenario("8k x64", "chat8k", 64, 6_000),
    Scenario("chunks 0 ms", "stream0", 64, 512),
    Scenario("chunks 5 ms", "stream5", 64, 256),
    Scenario("steps 5 ms", "steps5", 64, 256),
]


def bodies(folder: Path) -> None:
    """small: one short message. chat8k: some 8,000 tokens (32 kB) in 21 messages. streams: 100 events each; in steps
    those of all streams come at once, as from an engine, else each stream keeps to the time at which it began."""
    short = [{"role": "user", "content": "Say hello."}]
    words = "the gateway forwards every byte of a conversation as it came and never encodes it anew "
    long = [{"role": "system", "content": words * 20}]
    for _ in range(10):
        long += [{"role": "user", "content": words * 16}, {"role": "assistant", "content": words * 17}]
    made = {
        "small": {"model": "stub", "messages": short},
        "chat8k": {"model": "stub", "messages": [*long, *short]},
        "stream0": {"model": "stub", "stream": True, "max_tokens": 100, "seed": 0, "messages": short},
        "stream5": {"model": "stub", "stream": True, "max_tokens": 100, "seed": 5, "messages": short},
        "slow": {"model": "stub", "stream": True, "max_tokens": 600, "seed": 1000, "messages": short},
    }
    made["steps5"] = {**made["stream5"], "user": "steps"}
    for name, body in made.items():
        (folder / f"{name}.json").write_text(json.dumps(body, separators=(",", ":")))


def shoot(load: Path, port: int, body: Path, connections: int, requests: int) -> dict[str, float]:
    """One run of the load generator, on core 1."""
    command = ["taskset", "-c", "1", load, str(port), PATH, body, str(connections), str(requests), AUTH]
    said = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=300)
    if said.stderr:
        print(said.stderr, file=sys.stderr)
    answer: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return answer


def thousand_streams(load: Path, port: int, body: Path, tree: Tree) -> float:
    """Memory while 1,000 streams of an event a second are open, MB."""
    command = ["taskset", "-c", "1", str(load), str(port), PATH, str(body), "1000", "0", AUTH]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout is not None
        held.stdout.readline()
        time.sleep(5)
        mb = tree.pss_mb()
        assert held.stdin is not None
        held.stdin.close()
        held.wait(10)
    return mb


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m bench.gateway")
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--only", default=",".join(PROXIES))
    args.add_argument("--quick", action="store_true", help="a tenth of the requests, two rounds")
    given = args.parse_args()
    rounds = 2 if given.quick else given.rounds
    scale = 0.1 if given.quick else 1.0
    chosen = [PROXIES[n] for n in given.only.split(",")]

    stub_program, load = compiled(HERE / "stub.c"), compiled(HERE / "load.c")
    folder = Path(tempfile.mkdtemp(prefix="helexa-bench-"))
    bodies(folder)
    stub_port = free_port()
    cost: dict[tuple[str, str], list[float]] = defaultdict(list)
    latency: dict[tuple[str, str], list[float]] = defaultdict(list)
    memory: dict[str, list[float]] = defaultdict(list)
    with running([stub_program, str(stub_port)], cores="1", log=folder / "stub.log") as stub:
        wait_for_port(stub_port, stub)
        trees: dict[str, tuple[Tree, int]] = {}
        try:
            for proxy in chosen:
                port = free_port()
                (folder / proxy.name).mkdir()
                tree = Tree(
                    proxy.command(port, stub_port, folder / proxy.name),
                    cores="0",
                    log=folder / proxy.name / "log",
                    env={"LITELLM_MASTER_KEY": KEY},
                )
                trees[proxy.name] = tree, port
                wait_for_port(port, tree, 120)
                settle(load, port, folder / "small.json", tree)
                print(f"{proxy.name} is up", file=sys.stderr)
            for tree, _ in trees.values():
                tree.freeze()
            for n in range(rounds):
                for scenario in SCENARIOS:
                    order = chosen[n % len(chosen) :] + chosen[: n % len(chosen)]
                    body = folder / f"{scenario.body}.json"
                    direct = shoot(load, stub_port, body, 1, int(2_000 * scale)) if scenario.connections == 1 else {}
                    for proxy in order:
                        tree, port = trees[proxy.name]
                        tree.thaw()
                        requests = max(scenario.connections, 20, int(scenario.requests * scale * proxy.load))
                        shoot(load, port, body, scenario.connections, max(scenario.connections, requests // 10))
                        before = tree.cpu_ns()
                        got = shoot(load, port, body, scenario.connections, requests)
                        used_us = (tree.cpu_ns() - before) / 1000
                        tree.freeze()
                        if got["errors"]:
                            print(f"{proxy.name}, {scenario.key}: {got['errors']} errors", file=sys.stderr)
                            continue
                        key = (proxy.name, scenario.key)
                        cost[key].append(used_us / (got["events"] or got["requests"]))
                        if direct:
                            latency[(proxy.name, scenario.key + " p50")].append(
                                got["latency_p50_us"] - direct["latency_p50_us"]
                            )
                            latency[(proxy.name, scenario.key + " p99")].append(
                                got["latency_p99_us"] - direct["latency_p99_us"]
                            )
                        if got["events"]:
                            latency[(proxy.name, scenario.key + " p99")].append(got["delay_p99_us"] / 1000)
                    print(f"round {n + 1}: {scenario.key} done", file=sys.stderr)
            for proxy in chosen:
                tree, port = trees[proxy.name]
                tree.thaw()
                memory[proxy.name].append(thousand_streams(load, port, folder / "slow.json", tree))
                tree.freeze()
        finally:
            for tree, _ in trees.values():
                tree.stop()

    print(f"{machine()}\n{rounds} rounds, interleaved; median (least to greatest)\n")
    print("CPU of the gateway, µs per request\n")
    streams = {"chunks 0 ms": "0 ms apart", "chunks 5 ms": "5 ms apart", "steps 5 ms": "5 ms, in steps"}
    whole = [s.key for s in SCENARIOS if s.key not in streams]
    table(["gateway", *whole], [[name(p.name, p.version()), *(spread(cost[p.name, k]) for k in whole)] for p in chosen])
    print("\nCPU per relayed chunk at 64 streams, µs, and how late a chunk is at the 99th percentile, ms\n")
    head = ["gateway", *(word for told in streams.values() for word in (told, "late p99"))]
    rows = []
    for p in chosen:
        row = [p.name]
        for key in streams:
            row += [spread(cost[p.name, key]), spread(latency[p.name, key + " p99"])]
        rows.append(row)
    table(head, rows)
    print("\nLatency added at one connection, µs, and memory (PSS) with 1,000 slow streams open, MB\n")
    keys = ["small x1 p50", "small x1 p99", "8k x1 p50", "8k x1 p99"]
    rows = [[p.name, *(spread(latency[p.name, k], 0) for k in keys), spread(memory[p.name], 0)] for p in chosen]
    table(["gateway", *keys, "MB"], rows)
    if "cortex" in trees:
        print("\nRatios of the medians, cortex to the other\n")
        others = [p.name for p in chosen if p.name != "cortex"]
        all_keys = [s.key for s in SCENARIOS]
        table(["to", *all_keys], [[o, *(ratio(cost["cortex", k], cost[o, k]) for k in all_keys)] for o in others])


def settle(load: Path, port: int, body: Path, tree: Tree) -> None:
    """Routers listen before they trust their node: ask until an answer is right."""
    for _ in range(120):
        if not shoot(load, port, body, 1, 1)["errors"]:
            return
        time.sleep(0.5)
    raise SystemExit(f"no right answer on port {port}; see {tree.log}:\n{tree.log.read_text(errors='replace')[-2000:]}")


def name(proxy: str, its_version: str) -> str:
    return f"{proxy} {its_version}"


def ratio(ours: list[float], theirs: list[float]) -> str:
    from statistics import median

    return f"{median(ours) / median(theirs):.2f}" if ours and theirs else "-"


if __name__ == "__main__":
    main()
