"""What routing by prompt cache is worth on real nodes: `python -m bench.affinity`.

Three nodes, one engine thread each, one model on all of them, one gateway in front: once ours, once the same gateway
with "the fewest requests in flight" for its router. The load is agents: a long opening with instructions and tools that
all agents of a kind share, then turns that each add what a tool returned, soon after the answer. Rounds take turns, and
each has texts of its own, so that nothing of one round is cached for another.

Goal: prompt tokens computed at most 0.50 of least load's, and a lower p50 of the time to the first token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from random import Random
from typing import Any, Final

from bench.measure import machine, scratch, spread, table
from bench.models import smollm2
from bench.nodes import Program, cortex, neuron, versions

MODEL: Final = "smollm2"
KINDS: Final = 2
PAUSE_S: Final = 3.0  # a tool at work, in the mean
WORDS: Final = (
    "file line error test module return value list path build open close read write check fail pass import name type "
    "class method call result string number index key table column row query cache node model token server client"
)
LEAST_LOAD: Final = "from bench.affinity.__main__ import serve_least_load; serve_least_load()"


def serve_least_load() -> None:
    """`cortex serve --config FILE`, whose router takes the fewest requests in flight."""
    from helexa.cortex import cli
    from helexa.cortex.director import CortexDirector
    from helexa.cortex.router import choose

    def fewest(self: CortexDirector, _exchange: Any, _pursuit: Any, replicas: Any, tried: Any) -> Any:
        return choose(replicas, tried, self._rng)

    CortexDirector._choose = fewest  # type: ignore[method-assign]
    sys.argv[:1] = ["cortex", "serve"]
    cli.main()


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens by the engine's count; seconds to the first delta."""

    prompt: int
    computed: int
    first_s: float


@dataclass(slots=True)
class Round:
    turns: list[Turn] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def computed(self) -> int:
        return sum(turn.computed for turn in self.turns)

    def first_s(self, share: float) -> float:
        times = sorted(turn.first_s for turn in self.turns)
        return times[min(len(times) - 1, int(share * len(times)))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.affinity", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of each router")
    parser.add_argument("--agents", type=int, default=5, help="that run at the same time")
    parser.add_argument("--talks", type=int, default=1, help="conversations of each agent, one after the other")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--cores", default="0,1")
    args = parser.parse_args()
    folder = scratch()
    path = smollm2()
    with ExitStack() as stack:
        nodes = [_node(stack, folder / f"n{at}", path, args.cores) for at in range(3)]
        gateways = {
            "least load": stack.enter_context(
                cortex(folder / "least", *nodes, cores=args.cores, serve=[sys.executable, "-c", LEAST_LOAD])
            ),
            "ours": stack.enter_context(cortex(folder / "ours", *nodes, cores=args.cores)),
        }
        rounds: dict[str, list[Round]] = {name: [] for name in gateways}
        for at in range(args.rounds):
            for name, gateway in gateways.items():
                seed = f"{name}/{at}"
                rounds[name].append(play(gateway, seed, agents=args.agents, talks=args.talks, turns=args.turns))
                done = rounds[name][-1]
                print(f"{name} {at}: {done.computed:,} tokens, {done.seconds:.0f} s", file=sys.stderr)
    _show(rounds, path, args)


def _node(stack: ExitStack, folder: Path, path: Path, cores: str) -> Program:
    node = stack.enter_context(
        neuron(folder, cores=cores, toml=f'allowed_roots = ["{path.parent}"]\nspare_host = false')
    )
    node.load(MODEL, source=str(path), context=2048, slots=4, threads=1)
    return node


def play(gateway: Program, seed: str, *, agents: int, talks: int, turns: int) -> Round:
    """All agents at once, each with its conversations one after the other."""
    found = Round()
    faults: list[BaseException] = []

    def agent(number: int) -> None:
        try:
            for talk in range(talks):
                found.turns += converse(gateway.port, seed, f"{number}/{talk}", turns)
        except BaseException as err:
            faults.append(err)

    threads = [threading.Thread(target=agent, args=(number,)) for number in range(agents)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    found.seconds = time.monotonic() - begun
    return found


def converse(port: int, seed: str, talk: str, turns: int) -> list[Turn]:
    rng = Random(f"{seed}/{talk}")
    kind = rng.randrange(KINDS)
    messages = [
        {"role": "system", "content": _text(Random(f"{seed}/kind/{kind}"), 350)},
        {"role": "user", "content": _text(rng, 60)},
    ]
    found = []
    for _ in range(turns):
        turn, said = ask(port, messages)
        found.append(turn)
        messages += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": _text(rng, rng.randint(40, 120))},
        ]
        time.sleep(rng.expovariate(1 / PAUSE_S))
    return found


def _text(rng: Random, words: int) -> str:
    return " ".join(rng.choices(WORDS.split(), k=words))


def ask(port: int, messages: Sequence[dict[str, str]]) -> tuple[Turn, str]:
    """A streamed answer."""
    body = {
        "model": MODEL,
        "messages": messages,
        "max_tokens": 16,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        begun = time.monotonic()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        first_s, said, usage = 0.0, "", None
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", []):
                text = choice["delta"].get("content") or ""
                if text and not first_s:
                    first_s = time.monotonic() - begun
                said += text
    finally:
        connection.close()
    if answer.status != 200 or usage is None or not first_s:
        raise SystemExit(f"{answer.status}, and no whole answer: {said!r}")
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Turn(usage["prompt_tokens"], usage["prompt_tokens"] - cached, first_s), said


def _show(rounds: dict[str, list[Round]], path: Path, args: argparse.Namespace) -> None:
    print(
        f"{machine()}; {versions()}, {path.name}. Three nodes, one engine thread each, cores {args.cores}; "
        f"{args.agents} agents at once, {args.talks} conversations each of {args.turns} turns; {args.rounds} rounds of "
        "each router, by turns; median (least to greatest).\n"
    )
    rows = []
    for name, played in rounds.items():
        prompts = [turn.prompt for one in played for turn in one.turns]
        rows.append(
            [
                name,
                f"{statistics.mean(prompts):.0f}",
                spread([one.computed / len(one.turns) for one in played], 0),
                spread([1000 * one.first_s(0.5) for one in played], 0),
                spread([1000 * one.first_s(0.95) for one in played], 0),
                spread([one.seconds for one in played], 0),
            ]
        )
    head = ["router", "tokens a prompt", "of them computed", "p50 first token, ms", "p95, ms", "round, s"]
    table(head, rows)
    pairs = list(zip(rounds["ours"], rounds["least load"], strict=True))
    tokens = spread([a.computed / b.computed for a, b in pairs], 2)
    p50 = spread([a.first_s(0.5) / b.first_s(0.5) for a, b in pairs], 2)
    print(f"\nOurs by least load's: tokens computed {tokens} (<= 0.50), p50 {p50} (< 1)")


if __name__ == "__main__":
    main()
