"""Which replica serves a request. Pure: the model's live replica list in, one of them out. No clock, no I/O.

The list belongs to the fleet, which changes it between calls; nothing is copied here, since a view built for each
request would cost more than the decision.

Without a prompt: the fewest requests in flight. With one: the least time to its first token, which is

    the prompts ahead of it (s)  +  (prompt - what is cached there) / prefill rate  +  the wait for a slot

Measured (docs/explanation/routing.md). The gateway and the simulator run this module both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from helexa.cortex.prefixes import Prefixes, Prompt
from helexa.cortex.work import PREFILL, Asked, Ticket

if TYPE_CHECKING:
    from helexa.cortex.nodes import Replica

# Of more replicas these many are looked at, drawn at random, and as many of those that hold most of the prompt.
SAMPLE: Final = 8
# Expected times that differ by less than both of these together say nothing; the requests in flight do.
TIE_SHARE: Final = 1.1
TIE_S: Final = 0.005

WEIGHT_OF_TOKEN: Final = 4.0  # bytes; until a model's tokenizer has shown its own
_FORGET: Final = 0.95

# prefix: where most of the prompt is cached; session: where its session was last; moved: another replica holds more of
# it, and has too much to do; new: nobody knows it.
By: TypeAlias = Literal["prefix", "session", "moved", "new"]


def choose(replicas: Sequence[Replica], tried: Collection[str], rng: Random) -> Replica | None:
    """The replica with the fewest requests in flight; None where every one was tried.

    1. Nodes in `tried` (their names) are passed over: a request is not sent to the same failure twice.
    2. A node that is up comes before a suspect one, however busy it is.
    3. Of those, the fewest in flight; ties at random, each equally likely.
    """
    return _fewest(replicas, tried, rng, "up") or _fewest(replicas, tried, rng, "suspect")


def _fewest(replicas: Sequence[Replica], tried: Collection[str], rng: Random, state: str) -> Replica | None:
    # HOT, once per request and replica. Bench: bench/gateway.
    best: list[Replica] = []
    least = 0
    for replica in replicas:
        node = replica.node
        if node.state != state or (tried and node.name in tried):
            continue
        inflight = replica.inflight
        if not best or inflight < least:
            best, least = [replica], inflight
        elif inflight == least:
            best.append(replica)
    if len(best) > 1:
        return best[int(rng.random() * len(best))]
    return best[0] if best else None


class Choice:
    """Where a prompt goes. held: how much of it is believed to be cached there, in weight."""

    __slots__ = ("by", "held", "prompt", "replica")

    def __init__(self, replica: Replica, prompt: Prompt, held: float, by: By) -> None:
        self.replica = replica
        self.prompt = prompt
        self.held = held
        self.by = by


@dataclass(frozen=True, slots=True)
class Weighed:
    """One replica as a choice saw it. Seconds but for the tokens; expected_s is the sum of the three before it."""

    node: str
    state: str
    tokens: float
    cached: float
    prefill_rate: float
    inflight: int
    ahead_s: float
    prefill_s: float
    slot_s: float
    expected_s: float
    is_tried: bool = False

    def __str__(self) -> str:
        parts = [f"{self.node} {self.expected_s:.3f} s"]
        parts.append(f"{self.tokens - self.cached:.0f} of {self.tokens:.0f} tokens at {self.prefill_rate:.0f}/s")
        if self.ahead_s:
            parts.append(f"{self.ahead_s:.3f} s ahead")
        if self.slot_s:
            parts.append(f"{self.slot_s:.3f} s for a slot")
        parts.append(f"{self.inflight} in flight")
        if self.state != "up":
            parts.append(self.state)
        if self.is_tried:
            parts.append("tried")
        return ", ".join(parts)


def _fastest(replicas: Iterable[Replica]) -> float:
    """What a replica is taken to compute that has not shown it yet: as much as the best does. One that is thought slow
    would never be asked, and never known; one that is thought fast is known after a request."""
    return max([replica.work.rate or 0.0 for replica in replicas], default=0.0) or PREFILL


class ModelRouter:
    """One model's prompts over its replicas: who holds which prefix, and what a token of it weighs."""

    def __init__(self) -> None:
        self.prefixes: Prefixes[Replica] = Prefixes()
        self.weight_of_token = WEIGHT_OF_TOKEN
        self._measured = (0.0, 0.0)  # weight, and the tokens that it came to

    def choose(
        self, replicas: Sequence[Replica], tried: Collection[str], prompt: Prompt, now: float, rng: Random
    ) -> Choice | None:
        """HOT, for models with several replicas. The least expected time to the first token; None where every one was
        tried. Bench: bench/fleet cost.

        1. What of the prompt is cached where: by its hashes; where those say nothing, by its session.
        2. Of more than SAMPLE replicas a sample, and those that hold most of the prompt.
        3. Nodes in `tried` are passed over; a node that is up comes before a suspect one.
        4. Of those that come to about the least time, the fewest in flight; ties at random.
        """
        held, is_hint = self._held(replicas, prompt)
        looked_at: Collection[Replica] = replicas
        if len(replicas) > SAMPLE:
            looked_at = dict.fromkeys(rng.sample(replicas, SAMPLE))
            looked_at.update(zip(held, [None] * SAMPLE))  # noqa: B905  the first of them, which hold most
        replica = self._quickest(looked_at, tried, prompt, held, now, rng)
        if replica is None and len(replicas) > SAMPLE:
            replica = choose(replicas, tried, rng)
        if replica is None:
            return None
        mine = held.get(replica, 0.0)
        by: By = "new"
        if held:
            most = max(held.values())
            by = "moved" if mine < most else "session" if is_hint else "prefix"
        return Choice(replica, prompt, mine, by)

    def _held(self, replicas: Sequence[Replica], prompt: Prompt) -> tuple[Mapping[Replica, float], bool]:
        held = self.prefixes.match(prompt, len(replicas))
        if not held and (last := self.prefixes.last_of(prompt)) is not None:
            return {last[0]: min(last[1], prompt.weight)}, True
        return held, False

    def _quickest(
        self,
        replicas: Iterable[Replica],
        tried: Collection[str],
        prompt: Prompt,
        held: Mapping[Replica, float],
        now: float,
        rng: Random,
    ) -> Replica | None:
        weight, of_token = prompt.weight, self.weight_of_token
        up: list[tuple[float, int, Replica]] = []
        suspect: list[tuple[float, int, Replica]] = []
        guess = 0.0
        for replica in replicas:
            node = replica.node
            if tried and node.name in tried:
                continue
            work = replica.work
            missing = weight
            if replica in held:
                missing -= held[replica] * work.trust
            rate = work.rate
            if rate is None:
                if not guess:
                    guess = _fastest(replicas)
                rate = guess
            expected = missing / of_token / rate
            if work.pending:
                expected += work.ahead_s(now, rate)
            inflight = replica.inflight
            if work.slots is not None and inflight + replica.others >= work.slots:
                expected += work.slot_s(inflight + replica.others)
            (up if node.state == "up" else suspect).append((expected, inflight, replica))
        able = up or suspect
        if not able:
            return None
        if len(able) == 1:
            return able[0][2]
        limit = min([one[0] for one in able]) * TIE_SHARE + TIE_S
        best: list[Replica] = []
        least = 0
        for expected, inflight, replica in able:
            if expected > limit:
                continue
            if not best or inflight < least:
                best, least = [replica], inflight
            elif inflight == least:
                best.append(replica)
        return best[int(rng.random() * len(best))] if len(best) > 1 else best[0]

    def weigh(self, replicas: Sequence[Replica], tried: Collection[str], prompt: Prompt, now: float) -> list[Weighed]:
        """Why a choice falls as it does: every replica as `choose` would see it now, the quickest first."""
        held, _ = self._held(replicas, prompt)
        found = []
        for replica in replicas:
            work = replica.work
            cached = held.get(replica, 0.0) * work.trust / self.weight_of_token
            tokens = prompt.weight / self.weight_of_token
            inflight = replica.inflight + replica.others
            rate = work.rate or _fastest(replicas)
            parts = (work.ahead_s(now, rate), (tokens - cached) / rate, work.slot_s(inflight))
            found.append(
                Weighed(
                    node=replica.node.name,
                    state=replica.node.state,
                    tokens=tokens,
                    cached=cached,
                    prefill_rate=rate,
                    inflight=inflight,
                    ahead_s=parts[0],
                    prefill_s=parts[1],
                    slot_s=parts[2],
                    expected_s=sum(parts),
                    is_tried=replica.node.name in tried,
                )
            )
        return sorted(found, key=lambda w: (w.is_tried, w.state != "up", w.expected_s, w.inflight, w.node))

    # what became of it

    def sent(self, choice: Choice, asked: Asked, now: float, *, is_told: bool) -> Ticket:
        """The prompt went there, and is cached there from now on."""
        replica, prompt = choice.replica, choice.prompt
        work = replica.work
        is_hint = choice.by == "session"
        missing = prompt.weight if is_hint else prompt.weight - choice.held * work.trust
        ticket = Ticket(
            work,
            asked,
            prompt,
            missing / self.weight_of_token,
            cached=choice.held / self.weight_of_token,
            is_told=is_told,
            is_hint=is_hint,
            now=now,
        )
        work.add(ticket)
        self.prefixes.note(replica, prompt, work.kept_tokens * self.weight_of_token)
        return ticket

    def ended(self, ticket: Ticket, now: float, *, prompt_tokens: int = 0, cached_tokens: int = 0) -> None:
        """However it ended. Both counts are the engine's; no prompt_tokens: it did not say."""
        is_answered = prompt_tokens > 0
        ticket.work.ended(ticket, now, is_answered=is_answered)
        if is_answered:
            ticket.work.cached(ticket, cached_tokens)
            weight, tokens = self._measured
            self._measured = weight, tokens = _FORGET * weight + ticket.prompt.weight, _FORGET * tokens + prompt_tokens
            self.weight_of_token = weight / tokens

    def keep_only(self, live: Collection[Replica]) -> None:
        """The others were unloaded, or are away: what they had cached is not counted on."""
        for gone in self.prefixes.keep_only(live):
            gone.work.reset()
