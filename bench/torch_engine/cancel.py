"""How soon a cancel is heard while a long prompt is computed.

    python -m bench.torch_engine.cancel [--rounds 20] [--prompt 1900] [--model FOLDER]

The cancel comes at a moment drawn at random within the prefill; the time is from there to the request's last event.
"""

from __future__ import annotations

import queue
import random
import time
from itertools import pairwise

from bench.measure import Others, spread, table
from bench.torch_engine.opened import Opened, arguments
from helexa.neuron.harness.torch.request import Event, Finished, Progress, Request


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompt", type=int, default=1900)
    parser.set_defaults(rounds=20)
    given = parser.parse_args()
    opened = Opened(given, context=given.prompt + 64)
    rng, others = random.Random(1), Others([])
    opened.ask([Request(opened.words(400, rng), max_tokens=1)])
    took, chunks = [], []
    while len(took) < given.rounds:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        handle = opened.engine.submit(Request(opened.words(given.prompt, rng), max_tokens=1, progress=True), events.put)
        time.sleep(rng.uniform(0.05, 1.0))
        asked = time.perf_counter()
        opened.engine.cancel(handle)
        told = [0]
        while not isinstance(event := events.get(timeout=300), Finished):
            if isinstance(event, Progress):
                told.append(event.processed)
        if event.reason == "cancelled":
            took.append((time.perf_counter() - asked) * 1e3)
            chunks += [b - a for a, b in pairwise(told) if b > a]
    opened.engine.close()
    print(f"{given.rounds} cancels; median (least to greatest); other processes took {others.cores():.1f} cores\n")
    table(["", "", "at most"], [["heard after, ms", spread(took), "500"], ["tokens a chunk", spread(chunks, 0), "512"]])


if __name__ == "__main__":
    main()
