"""Generated conversations over one model, agents among them; everything follows from a seed.

An agent begins with the instructions and tools of its kind, some thousand tokens that all of that kind share, and adds
tool results a turn at short pauses: 7,400 tokens a prompt in the mean. A chat begins with a short system prompt, and a
person answers after a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from random import Random
from typing import Final

from helexa.cortex.simulate.serving import Conversation, Turn

# Kinds of conversation: their openings' ids and tokens.
AGENTS: Final = ((1, 2_000), (2, 3_000), (3, 4_000))
CHATS: Final = ((11, 60), (12, 200), (13, 400))
_AGENT_TURNS: Final = 6
_CHAT_TURNS: Final = 5


def mix(rate: float, seconds: float, rng: Random, *, agents: float = 0.3) -> list[Conversation]:
    """rate: conversations that begin a second. agents: the share of them that are agents."""
    found = []
    at = rng.expovariate(rate)
    while at < seconds:
        found.append(_agent(at, rng) if rng.random() < agents else _chat(at, rng))
        at += rng.expovariate(rate)
    return found


def mean_turns(conversations: Sequence[Conversation]) -> float:
    return sum(len(c.turns) for c in conversations) / len(conversations)


def _agent(start: float, rng: Random) -> Conversation:
    count = _count(_AGENT_TURNS, rng)
    turns = [Turn(rng.expovariate(1 / 3.0), _drawn(450, 0.8, rng), _drawn(120, 0.6, rng)) for _ in range(count)]
    return Conversation(start, rng.choice(AGENTS), turns)


def _chat(start: float, rng: Random) -> Conversation:
    count = _count(_CHAT_TURNS, rng)
    turns = [Turn(rng.expovariate(1 / 20.0), _drawn(60, 1.0, rng), _drawn(150, 0.7, rng)) for _ in range(count)]
    return Conversation(start, rng.choice(CHATS), turns)


def _count(mean: int, rng: Random) -> int:
    """Geometric, at least 1."""
    count = 1
    while rng.random() >= 1 / mean:
        count += 1
    return count


def _drawn(median: int, spread: float, rng: Random) -> int:
    return max(1, int(median * exp(rng.gauss(0, spread))))
