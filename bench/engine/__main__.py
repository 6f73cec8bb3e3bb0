"""What we add to the engine: decode speed and time to the first token, through cortex and neuron, and without them.

    python -m bench.engine [--pairs 12] [--streams 1,4,8] [--tokens 64] [--probes 40] [--quiet 0.1] [--quick]

One engine process serves all sides: "engine" is its own socket, asked directly; "neuron" goes through the node;
"cortex" through the gateway and the node. The engine's process is pinned to the cores of --engine-cores, one thread
each; everything else, the client included, to those of --other-cores. Rounds are interleaved, the order of the sides
changes with each, and figures are compared within a round only: medians of the ratios and differences of pairs.

A round is two parts. Decode: all streams at once, each with a prompt of its own, temperature 0, a fixed seed, the
end-of-text token ignored, the prompt cache off (`cache_prompt: false`), so that every side computes the same prompt
and as many tokens. First token: the same prompts with the cache on, once to fill it and then --probes times, the sides
by turns with every probe; the engine has a single token to compute before it answers, and what we add shows best. With
several streams it is a matter of chance, on every side, which of the requests come in time for the engine's first
step: hence so many probes.

A round in which other processes took more than --quiet cores is thrown away and taken again: such rounds are chosen by
what the machine did, never by what came out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Final

import uvloop

from bench.engine.client import Answer, Side, ask_at_once
from bench.measure import Others, cores_in, machine, pin, scratch, spread, table
from bench.models import smollm2
from bench.nodes import cortex, neuron, versions

MODEL: Final = "smollm2"
CONTEXT: Final = 1024
BATCH: Final = 128
PROBE_TOKENS: Final = 2
TOPICS: Final = ["rivers", "bridges", "clocks", "bread", "maps", "glass", "ships", "bees"]


@dataclass(slots=True)
class Turn:
    """What one side showed in one round."""

    decode_tok_s: float  # of all streams together
    first_ms: float  # prompt computed; mean of the streams
    first_cached_ms: float  # prompt in the cache; mean of the streams, and of the middle half of the probes


@dataclass(slots=True)
class Course:
    """All rounds of one number of streams."""

    turns: dict[str, list[Turn]] = field(default_factory=lambda: defaultdict(list))

    def seen(self, side: str, what: str) -> list[float]:
        return [getattr(turn, what) for turn in self.turns[side]]

    def ratios(self, side: str, what: str) -> list[float]:
        return [a / b for a, b in zip(self.seen(side, what), self.seen("engine", what), strict=True)]

    def differences(self, side: str, what: str) -> list[float]:
        return [a - b for a, b in zip(self.seen(side, what), self.seen("engine", what), strict=True)]


def bodies(streams: int, tokens: int, *, cached: bool) -> list[dict[str, Any]]:
    return [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Tell me a long story about {TOPICS[n % len(TOPICS)]} ({n})."}],
            "stream": True,
            "max_tokens": tokens,
            "temperature": 0,
            "seed": n,
            "ignore_eos": True,
            "cache_prompt": cached,
        }
        for n in range(streams)
    ]


async def take_turns(sides: list[Side], streams: int, tokens: int, probes: int) -> dict[str, Turn]:
    """One round: each side's decode, then the probes of all sides by turns, one at a time."""
    decoded: dict[str, list[Answer]] = {}
    for side in sides:
        decoded[side.name] = await ask_at_once(side, bodies(streams, tokens, cached=False))
        check(decoded[side.name], tokens)
    cached: dict[str, list[float]] = {side.name: [] for side in sides}
    for side in sides:  # one fills the engine's cache, and each has its connections
        await ask_at_once(side, bodies(streams, PROBE_TOKENS, cached=True))
    for n in range(probes):
        for side in rotated(sides, n):
            quick = await ask_at_once(side, bodies(streams, PROBE_TOKENS, cached=True))
            check(quick, PROBE_TOKENS, prompt_tokens=1)
            cached[side.name].append(statistics.fmean(a.first_s for a in quick) * 1000)
    return {
        name: Turn(
            decode_tok_s=sum(a.decode_tok_s for a in answers),
            first_ms=statistics.fmean(a.first_s for a in answers) * 1000,
            first_cached_ms=middle_half(cached[name]),
        )
        for name, answers in decoded.items()
    }


def rotated(sides: list[Side], n: int) -> list[Side]:
    return sides[n % len(sides) :] + sides[: n % len(sides)]


def middle_half(values: list[float]) -> float:
    """The mean of what is left without the least and the greatest quarter."""
    quarter = len(values) // 4
    return statistics.fmean(sorted(values)[quarter : len(values) - quarter])


def check(answers: list[Answer], tokens: int, prompt_tokens: int | None = None) -> None:
    """Sides are compared only where they did the same work."""
    for answer in answers:
        if answer.tokens != tokens:
            raise SystemExit(f"{answer.tokens} tokens were generated, {tokens} were asked for")
        if prompt_tokens is not None and answer.prompt_tokens not in (None, prompt_tokens):
            print(f"{answer.prompt_tokens} tokens of the prompt were computed, not {prompt_tokens}", file=sys.stderr)


async def run(sides: list[Side], others: Others, given: argparse.Namespace) -> tuple[dict[int, Course], int]:
    """The courses, and how many rounds were thrown away."""
    courses = {streams: Course() for streams in given.streams}
    thrown = 0
    await take_turns(sides, max(given.streams), 8, 1)  # connections, page cache, the client's own code
    for n in range(given.pairs):
        for streams, course in courses.items():
            while True:
                others.start()
                turns = await take_turns(rotated(sides, n), streams, given.tokens, given.probes)
                if (busy := others.cores()) <= given.quiet:
                    break
                thrown += 1
                print(f"round {n + 1}, {streams} streams: others took {busy:.2f} cores; again", file=sys.stderr)
            for name, turn in turns.items():
                course.turns[name].append(turn)
        print(f"round {n + 1} of {given.pairs} done", file=sys.stderr)
    return courses, thrown


WAYS: Final = {"neuron": "client, neuron, engine", "cortex": "client, cortex, neuron, engine"}


def report(courses: dict[int, Course]) -> None:
    print("\nDecode, tokens a second of all streams together\n")
    rows = [
        [str(streams), way, *both(course, side, "decode_tok_s"), spread(course.ratios(side, "decode_tok_s"), 3)]
        for streams, course in courses.items()
        for side, way in WAYS.items()
    ]
    table(["streams", "way", "engine alone", "through us", "ratio of pairs"], rows)
    for what, of in (("first_cached_ms", "in the engine's cache"), ("first_ms", "computed")):
        print(f"\nTime to the first token, ms, mean of the streams; the prompt is {of}\n")
        rows = [
            [str(streams), way, *both(course, side, what), spread(course.differences(side, what), 2)]
            for streams, course in courses.items()
            for side, way in WAYS.items()
        ]
        table(["streams", "way", "engine alone", "through us", "difference of pairs"], rows)


def both(course: Course, side: str, what: str) -> list[str]:
    return [spread(course.seen("engine", what)), spread(course.seen(side, what))]


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m bench.engine")
    args.add_argument("--pairs", type=int, default=12)
    args.add_argument("--streams", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 8])
    args.add_argument("--tokens", type=int, default=64)
    args.add_argument("--probes", type=int, default=40)
    args.add_argument("--quiet", type=float, default=0.1, help="cores that others may take in a round that counts")
    args.add_argument("--engine-cores", default="1")
    args.add_argument("--other-cores", default="0")
    args.add_argument("--quick", action="store_true", help="three pairs of 24 tokens, 5 probes")
    given = args.parse_args()
    if given.quick:
        given.pairs, given.tokens, given.probes = 3, 24, 5

    folder = scratch()
    pin(os.getpid(), given.other_cores)
    slots, threads = max(given.streams), len(cores_in(given.engine_cores))
    profile = {"context": CONTEXT, "slots": slots, "batch": BATCH, "threads": threads}
    with neuron(folder, cores=given.other_cores, toml="spare_host = false") as node:
        node.load(MODEL, source=str(smollm2()), **profile)
        (host,) = node.hosts()
        pin(host, given.engine_cores)
        with cortex(folder, node, cores=given.other_cores) as gateway:
            spec = node.spec(MODEL)
            sides = [
                Side("engine", unix=spec["socket"], key=spec["api_key"]),
                Side("neuron", port=node.port),
                Side("cortex", port=gateway.port),
            ]
            courses, thrown = uvloop.run(run(sides, Others([node.tree, gateway.tree]), given))
    print(f"{machine()}\n{versions()}, {smollm2().name}")
    print(
        f"{slots} slots of {CONTEXT} tokens, batch {BATCH}, {threads} engine thread(s) on core {given.engine_cores}, "
        f"all else on core {given.other_cores}; {given.tokens} tokens a stream, {given.probes} probes; "
        f"{given.pairs} interleaved pairs, median (least to greatest); {thrown} rounds thrown away, in which others "
        f"took more than {given.quiet:g} of a core"
    )
    report(courses)


if __name__ == "__main__":
    main()
