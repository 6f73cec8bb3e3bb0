"""The next turn of a long conversation after its model had to make room for another.

    python -m bench.kv [--rounds 3] [--tokens 3384] [--cores 0,1]

A conversation of so many tokens with SmolLM2; then the model is unloaded, Gemma loaded and unloaded, SmolLM2 loaded
again, and the conversation goes on. On a node that keeps prompt caches (the default) and, with the same words, on one
that does not. Before the second swap of a round the node that keeps has had time to write ahead.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.request import urlopen

import uvloop

from bench.engine.client import Answer, Side, ask_at_once
from bench.measure import machine, scratch, spread, table
from bench.models import gemma, smollm2
from bench.nodes import Program, neuron, versions

MODEL: Final = "smollm2"
ANSWER: Final = 16  # tokens
WORDS: Final = (
    "stone",
    "river",
    "market",
    "winter",
    "letter",
    "garden",
    "window",
    "captain",
    "bridge",
    "engine",
    "forest",
)


@dataclass(slots=True)
class Talk:
    """A conversation that grows."""

    node: Program
    messages: list[dict[str, str]] = field(default_factory=list)

    def turn(self, text: str) -> Answer:
        self.messages.append({"role": "user", "content": text})
        body = {
            "model": MODEL,
            "messages": self.messages,
            "stream": True,
            "max_tokens": ANSWER,
            "temperature": 0,
            "logit_bias": {"2": -100},  # never its end of turn
        }
        (answer,) = uvloop.run(ask_at_once(Side("neuron", port=self.node.port), [body]))
        self.messages.append({"role": "assistant", "content": "I see."})
        return answer


def text_of(node: Program, tokens: int, seed: int) -> str:
    """So long that the prompt has about as many tokens."""
    rng = random.Random(seed)
    words = [f"{rng.choice(WORDS)} {rng.randrange(1000)}" for _ in range(tokens)]
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        asked = {"model": MODEL, "messages": [{"role": "user", "content": " ".join(words[:middle])}]}
        if node.ask("POST", "/v1/tokens/count", asked)["input_tokens"] <= tokens:
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])


def saved(node: Program) -> int:
    with urlopen(f"http://127.0.0.1:{node.port}/metrics") as answer:
        found = re.search(rb"^neuron_kv_saved_total ([\d.]+)", answer.read(), re.MULTILINE)
    return int(float(found[1])) if found is not None else 0


def timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m bench.kv")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--tokens", type=int, default=3384)
    args.add_argument("--cores", default="0,1")
    args.add_argument("--threads", type=int, default=2)
    given = args.parse_args()

    folder = scratch()
    context = given.tokens + 1024
    profile = {"source": str(smollm2()), "context": context, "slots": 2, "threads": given.threads}
    other = {"source": str(gemma()), "context": 2048, "slots": 2, "threads": given.threads}
    seen: dict[tuple[str, str], list[float]] = defaultdict(list)
    computed: dict[tuple[str, str], list[float]] = defaultdict(list)
    with (
        neuron(folder / "kept", cores=given.cores) as kept,
        neuron(folder / "not", cores=given.cores, toml="kv_store = false") as without,
    ):
        for n in range(given.rounds):
            for side, node in (("kept", kept), ("not kept", without)):
                node.load(MODEL, **profile)
                talk = Talk(node)
                turns = [text_of(node, given.tokens, n), "Go on.", "And then?"]
                for number, text in enumerate(turns):
                    if number:
                        before = saved(node)
                        if number == 2 and side == "kept":
                            while saved(node) == before:
                                time.sleep(0.2)
                        ahead = "at once" if number == 1 else "after a rest"
                        seen[side, f"unload {ahead}"].append(timed(lambda node=node: node.unload(MODEL)))
                        node.load("gemma", **other)
                        node.unload("gemma")
                        seen[side, "load"].append(timed(lambda node=node: node.load(MODEL, **profile)))
                    answer = talk.turn(text)
                    what = "first turn" if number == 0 else "next turn"
                    seen[side, what].append(answer.first_s * 1000)
                    computed[side, what].append(answer.prompt_tokens or 0)
                node.unload(MODEL)
            print(f"round {n + 1} of {given.rounds} done", file=sys.stderr)

    print(f"{machine()}\n{versions()}")
    print(
        f"{smollm2().name}, 2 slots of {context} tokens, a prompt of {given.tokens}; {given.threads} engine threads, "
        f"cores {given.cores}; {given.rounds} rounds, two swaps in each; ms, median (least to greatest)\n"
    )
    parts = ["first turn", "unload at once", "unload after a rest", "load", "next turn"]
    rows = [[side, *(spread(seen[side, part], 0) for part in parts)] for side in ("kept", "not kept")]
    for row, side in zip(rows, ("kept", "not kept"), strict=True):
        row.append(f"{statistics.median(computed[side, 'next turn']):.0f}")
    table(["prompt cache", *parts, "tokens computed"], rows)
    ratio = statistics.median(seen["kept", "next turn"]) / statistics.median(seen["not kept", "next turn"])
    print(f"\nThe next turn's first token, kept to not kept: {ratio:.3f}")


if __name__ == "__main__":
    main()
