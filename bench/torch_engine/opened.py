"""The engine over SmolLM2's safetensors, in this process, for the benches beside this module."""

from __future__ import annotations

import argparse
import os
import queue
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer

from bench.measure import machine
from helexa.neuron.harness.torch.engine import Engine
from helexa.neuron.harness.torch.request import Event, Failed, Finished, Limits, Request, Text
from helexa.neuron.harness.torch.shard import LocalRunner, load_shard, whole_model

WORDS = ["river", "bridge", "clock", "bread", "map", "glass", "ship", "bee", "stone", "letter", "window", "garden"]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    cache = Path(os.environ.get("HELEXA_TEST_CACHE") or Path.home() / ".cache" / "helexa-tests")
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=cache / "smollm2-135m-instruct-f32-v1", help="a folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    return parser


@dataclass(frozen=True, slots=True)
class Answer:
    """first_s: from the request to its first token; whole_s: to its end."""

    first_s: float
    whole_s: float
    tokens: tuple[int, ...]
    finished: Finished


class Opened:
    def __init__(self, given: argparse.Namespace, *, context: int = 2048, rows: int = 8) -> None:
        if not given.model.is_dir():
            raise SystemExit(
                f"{given.model} is not there: the tests make it (pytest tests/integration/torch), or --model"
            )
        shard = load_shard(whole_model(given.model, threads=given.threads), None)
        self.tokenizer = Tokenizer.from_file(str(given.model / "tokenizer.json"))
        limits = Limits(context, rows, 512, 4 * rows * context, shard.config.vocabulary)
        self.engine = Engine(LocalRunner(shard), self.tokenizer, limits, name=given.model.name, eos=shard.config.eos)
        print(f"{machine()}; torch {version('torch')}, {given.threads} threads, float32; {given.model.name}\n")

    def words(self, tokens: int, rng: random.Random) -> tuple[int, ...]:
        """A text that was never asked before."""
        text = " ".join(rng.choice(WORDS) for _ in range(tokens))
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids[:tokens])

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """All at once."""
        began = time.perf_counter()
        asked: list[queue.SimpleQueue[tuple[float, Event]]] = []
        for request in requests:
            events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
            asked.append(events)
            self.engine.submit(request, lambda event, put=events.put: put((time.perf_counter(), event)))  # type: ignore[misc]
        return [self._take(events, began) for events in asked]

    def _take(self, events: queue.SimpleQueue[tuple[float, Event]], began: float) -> Answer:
        first: float | None = None
        tokens: list[int] = []
        while True:
            at, event = events.get(timeout=300)
            if isinstance(event, Text):
                first = first or at
                tokens += [logprob.id for logprob in event.logprobs]
            elif isinstance(event, Failed):
                raise SystemExit(event.error.message)
            elif isinstance(event, Finished):
                return Answer((first or at) - began, at - began, tuple(tokens), event)
