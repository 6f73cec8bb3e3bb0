"""Which tokens of which sequences the next step computes. Pure: no clock, no torch; one caller.

Continuous batching: every sequence that is at its answer has its row in each step, and what `chunk` allows of the
prompts of others is computed beside them. Sequences are let in by arrival; one that finds no room is not overtaken, so
none starves. When memory runs out the youngest gives its slab back and waits, in its old place, to go on later; the
oldest is never put off, and a whole context always fits, so something always moves.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Final

from helexa.neuron.harness.torch.blocks import BLOCK, Chain, Pool, Slab
from helexa.neuron.harness.torch.step import Copy, Row, Step

AHEAD: Final = 256  # tokens for which a slab has more room than its prompt takes: the answer, and a next turn
TAIL: Final = 4  # a chunk may be longer by this part of it, where that ends a prompt
DECODE: Final = 8  # a row of at most so many tokens is taken for a step of an answer, outside the chunk


@dataclass(eq=False, slots=True)
class Sequence:
    """One request's tokens, and how far they are computed.

    number:  grows with each arrival
    prompt:  tokens of the prompt
    hidden:  hidden states are wanted, not logits; every: of each token, else of the last
    done:    tokens whose keys and values its slab holds; meaningless while it waits
    cached:  of its prompt when it was first let in; None before
    """

    number: int
    chain: Chain
    prompt: int
    hidden: bool = False
    every: bool = False
    slab: Slab | None = None
    done: int = 0
    cached: int | None = None

    def __len__(self) -> int:
        return len(self.chain)

    @property
    def pending(self) -> int:
        return len(self.chain) - self.done

    def __lt__(self, other: Sequence) -> bool:
        return self.number < other.number


@dataclass(frozen=True, slots=True)
class Part:
    """One row of a step: `count` tokens of this sequence from its `done` on, the last `wanted` of them answered."""

    sequence: Sequence
    count: int
    wanted: int


@dataclass(frozen=True, slots=True)
class Plan:
    step: Step
    parts: list[Part]
    admitted: list[Sequence] = field(default_factory=list)

    @property
    def prefill(self) -> int:
        """Tokens that are not those of answers under way."""
        return sum(part.count for part in self.parts if part.count > DECODE)


class Scheduler:
    """add, plan, done, (append | finish), plan, ... chunk: prompt tokens per step; may be changed between plans.
    context: tokens that a sequence comes to at most."""

    def __init__(self, *, rows: int, chunk: int, kv_tokens: int, context: int, ahead: int = AHEAD) -> None:
        self._context, self._ahead = context, ahead
        self.rows = rows
        self.chunk = chunk
        self.pool = Pool(kv_tokens)
        self.running: list[Sequence] = []  # by arrival, as is
        self.waiting: list[Sequence] = []
        self.preemptions = 0
        self._arrivals = 0
        self._hidden = False  # of the last step, where both kinds are there

    def add(self, prompt: tuple[int, ...] | list[int], *, hidden: bool = False, every: bool = False) -> Sequence:
        self._arrivals += 1
        sequence = Sequence(self._arrivals, Chain(prompt), len(prompt), hidden, every)
        self.waiting.append(sequence)
        return sequence

    def plan(self) -> Plan | None:
        """The next step; None where there is nothing to do. `done` is to be called with it once it is carried out.

        1. Who is at its answer gets room for its next tokens; the youngest is preempted where there is none.
        2. Who waits is let in, by arrival, while there are rows and room.
        3. The chunk is dealt out: half to who waited longest, the rest to who needs least, so that a short prompt
           does not wait for a long one, nor a long one for ever. A short end of a prompt comes with it, for it would
           take a whole step of its own.
        """
        if not self.running and not self.waiting:
            return None
        self.pool.begin()
        self._make_room()
        copies: list[Copy] = []
        admitted = self._admit(copies)
        kinds = {sequence.hidden for sequence in self.running}
        self._hidden = kinds.pop() if len(kinds) == 1 else not self._hidden
        parts = [self._part(s, n) for s, n in self._deal([s for s in self.running if s.hidden is self._hidden])]
        rows = [
            Row(p.sequence.slab.number, p.sequence.done, _next(p), p.wanted, p.sequence.slab.blocks * BLOCK)
            for p in parts
            if p.sequence.slab is not None
        ]
        return Plan(Step(rows, self.pool.take_drops(), copies, self._hidden), parts, admitted)

    def done(self, plan: Plan) -> None:
        """The step was carried out."""
        for part in plan.parts:
            sequence = part.sequence
            sequence.done += part.count
            if sequence.slab is not None and not sequence.hidden:
                self.pool.hold(sequence.slab, sequence.done)

    def append(self, sequence: Sequence, token: int) -> None:
        """The token that was chosen, to be computed next."""
        sequence.chain.append(token)

    def finish(self, sequence: Sequence) -> None:
        """It ended, or was cancelled, wherever it stands. What it computed stays in the prefix cache."""
        if sequence.slab is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._close(sequence)

    def restart(self, kv_tokens: int) -> None:
        """No slab is left: whoever ran waits again, to be computed anew within this budget."""
        for sequence in self.running:
            sequence.slab = None
            insort(self.waiting, sequence)
        self.running.clear()
        self.pool.reset(kv_tokens // BLOCK)

    def _make_room(self) -> None:
        at = 0
        while at < len(self.running):
            sequence = self.running[at]
            assert sequence.slab is not None
            if self.pool.grow(sequence.slab, len(sequence.chain), self._context):
                at += 1
                continue
            youngest = self.running.pop()  # perhaps this very one
            self._close(youngest)
            insort(self.waiting, youngest)
            self.preemptions += 1

    def _admit(self, copies: list[Copy]) -> list[Sequence]:
        admitted = []
        for sequence in list(self.waiting):
            if len(self.running) >= self.rows:
                break
            if self._awaits_prefix(sequence):
                continue
            # So that those who run can take a block more before one has to go again.
            spare = len(self.running) + 1 if self.running else 0
            ahead = 0 if sequence.hidden else min(self._context, len(sequence.chain) + self._ahead)
            opened = self.pool.open(sequence.chain, room=ahead, spare=spare, cache=not sequence.hidden)
            if opened is None:
                opened = self.pool.open(sequence.chain, spare=spare, cache=not sequence.hidden)
            if opened is None:
                break
            self.waiting.remove(sequence)
            sequence.slab, sequence.done = opened.slab, opened.cached
            if opened.copy is not None:
                copies.append(opened.copy)
            if sequence.cached is None:
                sequence.cached = opened.cached
                admitted.append(sequence)
            insort(self.running, sequence)
        return admitted

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """An earlier sequence computes, right now, a beginning that this one can then copy."""
        if sequence.hidden:
            return False
        for leader in self.running:
            if leader.number > sequence.number or leader.hidden or leader.pending <= DECODE:
                continue
            shared = leader.chain.common(sequence.chain, min(len(leader.chain), len(sequence.chain)) - 1)
            if shared >= BLOCK and leader.done < shared:
                return True
        return False

    def _deal(self, sequences: list[Sequence]) -> list[tuple[Sequence, int]]:
        answers = [(s, s.pending) for s in sequences if s.pending <= DECODE]
        prefills = [s for s in sequences if s.pending > DECODE]
        if not prefills:
            return answers
        left = self.chunk
        shares: dict[Sequence, int] = {}
        oldest = prefills[0]
        shares[oldest] = min(oldest.pending, max(1, left // 2))
        left -= shares[oldest]
        for sequence in sorted(prefills, key=lambda s: s.pending):
            if left <= 0:
                break
            rest = sequence.pending - shares.get(sequence, 0)
            more = rest if rest <= left + self.chunk // TAIL else left
            shares[sequence] = shares.get(sequence, 0) + more
            left -= more
        return answers + [(s, n) for s in prefills if (n := shares.get(s, 0)) > 0]

    def _part(self, sequence: Sequence, count: int) -> Part:
        if sequence.every:
            return Part(sequence, count, count)
        return Part(sequence, count, 1 if count == sequence.pending else 0)

    def _close(self, sequence: Sequence) -> None:
        assert sequence.slab is not None
        self.pool.close(sequence.slab, keep=not sequence.hidden)
        sequence.slab = None


def _next(part: Part) -> list[int]:
    done = part.sequence.done
    return part.sequence.chain.tokens[done : done + part.count]
