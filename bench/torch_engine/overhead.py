"""What the engine itself takes beside the model: planning, sampling, text and events, per step.

    python -m bench.torch_engine.overhead [--rounds 3] [--streams 1,8] [--tokens 48] [--model FOLDER]

"own" is processor time of the engine's thread outside the runner; "step" is the time within it. Streams decode at once.
"""

from __future__ import annotations

import random

from bench.measure import Others, spread, table
from bench.torch_engine.opened import Opened, arguments
from helexa.neuron.harness.torch.request import Grammar, Request, Sampling

KINDS = {
    "greedy": Request((0,), sampling=Sampling(temperature=0.0)),
    "temperature 1": Request((0,), sampling=Sampling()),
    "temperature 0.8, top_p 0.95": Request((0,), sampling=Sampling(temperature=0.8, top_p=0.95)),
    "temperature 0.7, top_k 20, top_p 0.8": Request((0,), sampling=Sampling(temperature=0.7, top_k=20, top_p=0.8)),
    "with three penalties": Request((0,), sampling=Sampling(0.7, 20, 0.8, 0.0, 1.1, 0.5, 0.5)),
    "greedy, logprobs and 5 top ones": Request((0,), sampling=Sampling(temperature=0.0), logprobs=5),
    "greedy, a JSON schema": Request(
        (0,),
        sampling=Sampling(temperature=0.0),
        grammar=Grammar("json_schema", '{"type": "array", "items": {"type": "integer"}, "minItems": 50}'),
    ),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--tokens", type=int, default=48)
    parser.set_defaults(rounds=3)
    given = parser.parse_args()
    streams = [int(n) for n in given.streams.split(",")]
    opened = Opened(given, context=1024, rows=max(streams))
    costs, rng, others = opened.engine.costs, random.Random(1), Others([])
    own: dict[tuple[str, int], list[float]] = {}
    step: dict[tuple[str, int], list[float]] = {}
    for _ in range(given.rounds):
        for name, request in KINDS.items():
            for count in streams:
                before = costs.steps, costs.own_s, costs.computed_s
                opened.ask(
                    [
                        Request(
                            opened.words(30, rng),
                            max_tokens=given.tokens,
                            sampling=request.sampling,
                            grammar=request.grammar,
                            logprobs=request.logprobs,
                            ignore_eos=True,
                        )
                        for _ in range(count)
                    ]
                )
                steps = costs.steps - before[0]
                own.setdefault((name, count), []).append((costs.own_s - before[1]) / steps * 1e3)
                step.setdefault((name, count), []).append((costs.computed_s - before[2]) / steps * 1e3)
    opened.engine.close()
    print(f"{given.rounds} rounds; median (least to greatest), ms a step; others took {others.cores():.1f} cores\n")
    table(
        ["sampling", *(f"{n} streams: {what}" for n in streams for what in ("own", "step"))],
        [[k, *(spread(d[k, n], 2) for n in streams for d in (own, step))] for k in KINDS],
    )


if __name__ == "__main__":
    main()
