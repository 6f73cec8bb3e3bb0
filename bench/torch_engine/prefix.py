"""What the prefix cache gives a conversation: the time to the first token of its second turn.

    python -m bench.torch_engine.prefix [--rounds 7] [--conversation 1000] [--answer 64] [--message 32] [--model FOLDER]

Each round has a conversation of its own. "first turn": none of it was ever computed. "second turn": the same
conversation, the answer to it, and a new message. "uncached alone": a prompt of just as many tokens as the second turn
had to compute, with nothing before them, so that they attend to themselves only. "in their place": the model's own time
for the second turn's tokens, behind those of the first. Ratios are taken within a round.
"""

from __future__ import annotations

import random

from bench.measure import Others, spread, table
from bench.torch_engine.opened import Answer, Opened, arguments
from helexa.neuron.harness.torch.request import Request, Sampling

GREEDY = Sampling(temperature=0.0)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--conversation", type=int, default=1000)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--message", type=int, default=32)
    given = parser.parse_args()
    opened = Opened(given, context=given.conversation + given.answer + given.message + 64)
    rng = random.Random(1)

    def turn(prompt: tuple[int, ...], tokens: int) -> Answer:
        return opened.ask([Request(prompt, max_tokens=tokens, sampling=GREEDY, ignore_eos=True, logprobs=0)])[0]

    turn(opened.words(given.conversation, rng), 8)  # warms up, and finds the pace
    turn(opened.words(given.conversation, rng), 8)
    firsts, seconds, alones, places, computed, busy = [], [], [], [], [], []
    for _ in range(given.rounds):
        others = Others([])
        conversation = opened.words(given.conversation, rng)
        first = turn(conversation, given.answer)
        before = opened.engine.costs.computed_s
        second = turn((*conversation, *first.tokens, *opened.words(given.message, rng)), 1)
        places.append((opened.engine.costs.computed_s - before) * 1e3)
        alone = turn(opened.words(second.finished.timings.prompt_n, rng), 1)
        firsts.append(first.first_s * 1e3)
        seconds.append(second.first_s * 1e3)
        alones.append(alone.first_s * 1e3)
        computed.append(second.finished.timings.prompt_n)
        busy.append(others.cores())
    opened.engine.close()
    print(f"{given.rounds} rounds; median (least to greatest); other processes took {spread(busy)} cores\n")
    table(
        ["time to the first token", "ms", "tokens computed"],
        [
            ["first turn", spread(firsts), str(given.conversation)],
            ["second turn", spread(seconds), spread(computed, 0)],
            ["uncached alone", spread(alones), spread(computed, 0)],
            ["uncached in their place", spread(places), spread(computed, 0)],
        ],
    )
    print()
    table(
        ["ratio", "is", "at most"],
        [
            ["second turn / first turn", spread([b / a for a, b in zip(firsts, seconds, strict=True)], 3), "0.2"],
            ["second turn / uncached alone", spread([b / c for b, c in zip(seconds, alones, strict=True)], 3), "1.3"],
            ["second turn / in their place", spread([b / p for b, p in zip(seconds, places, strict=True)], 3), ""],
        ],
    )


if __name__ == "__main__":
    main()
