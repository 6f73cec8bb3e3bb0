"""What one replica has before it, and how fast it is: prompts that wait for their first token, rates by measurement.
Pure: times are given; that a prompt is done is read from what its request shows.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from helexa.cortex.prefixes import Prompt

PREFILL: Final = 1000.0  # tokens a second, until any replica has shown its own
REQUEST_S: Final = 5.0
KEPT_TOKENS: Final = 2**18  # of prompts, by a replica that tells nothing of its size

# Engines keep prompts beside the slots too (llama.cpp: in host memory, as much again), and a bound that is too large
# costs less than one that is too small (`prefixes.Prefixes`).
_KEPT: Final = 2
_FORGET: Final = 0.9  # of what was measured, with each new figure
_LEAST_PROMPT: Final = 32  # tokens; what a shorter one takes is no rate
_LEAST_TRUST: Final = 0.2


class Asked(Protocol):
    """A request, as far as its prompt goes; the relay's Exchange is one."""

    @property
    def t_first_token(self) -> float:
        """0.0 until it happened."""


class Ticket:
    """One prompt at one replica. tokens: still to be computed when it was sent; cached: believed to be there already.

    is_told: that its first token came will show; else it counts as computed when that should have happened.
    is_hint: what it is believed to find there, only its session says.
    """

    __slots__ = ("asked", "cached", "is_hint", "is_over", "is_told", "prompt", "sent_at", "tokens", "work")

    def __init__(
        self,
        work: Work,
        asked: Asked,
        prompt: Prompt,
        tokens: float,
        *,
        cached: float,
        is_told: bool,
        is_hint: bool,
        now: float,
    ) -> None:
        self.work = work
        self.asked = asked
        self.prompt = prompt
        self.tokens = tokens
        self.cached = cached
        self.is_told = is_told
        self.is_hint = is_hint
        self.sent_at = now
        self.is_over = False


class Work:
    """What is known of one replica.

    rate:        of prompts, tokens a second; None until it was measured
    pending:     prompts that have not shown their first token; ahead_s is worth asking where there are any
    request_s:   what a request takes there
    slots:       requests that run at once, where known
    kept_tokens: of prompts, how much it can keep
    trust:       how much of what it was believed to have kept it had
    """

    __slots__ = ("_ahead", "_free_at", "_measured", "kept_tokens", "pending", "rate", "request_s", "slots", "trust")

    def __init__(self) -> None:
        self.rate: float | None = None
        self.request_s = REQUEST_S
        self.slots: int | None = None
        self.kept_tokens: float = KEPT_TOKENS
        self.trust = 1.0
        self._measured = (0.0, 0.0)  # tokens, and the seconds that they took
        self.pending: deque[Ticket] = deque()
        self._ahead = 0.0  # tokens of all pending
        self._free_at = 0.0  # when the prompt before the first pending one was done

    def of_size(self, slots: int | None, context: int | None) -> None:
        """As the replica's node describes it."""
        self.slots = slots
        self.kept_tokens = _KEPT * (slots or 1) * context if context else KEPT_TOKENS

    # asking

    def ahead_s(self, now: float, rate: float) -> float:
        """HOT. Until the prompts that it has are computed, at this rate: one after the other, in turn."""
        pending = self.pending
        while pending:
            first = pending[0]
            began = first.sent_at if first.sent_at > self._free_at else self._free_at
            done_at = first.asked.t_first_token
            if not done_at:
                if not first.is_over:
                    should_take = first.tokens / rate
                    spent = now - began
                    if first.is_told or spent < should_take:
                        left = self._ahead / rate - (spent if spent < should_take else should_take)
                        return left if left > 0.0 else 0.0
                    done_at = began + should_take
                else:
                    done_at = began
            self._free_at = done_at if done_at > began else began
            self._ahead -= first.tokens
            pending.popleft()
        self._ahead = 0.0
        return 0.0

    def slot_s(self, inflight: int) -> float:
        """Until one of its slots is free for a request that comes after `inflight` others."""
        if self.slots is None or inflight < self.slots:
            return 0.0
        return (inflight - self.slots + 1) * self.request_s / self.slots

    # telling

    def add(self, ticket: Ticket) -> None:
        """A prompt was sent there."""
        self.pending.append(ticket)
        self._ahead += ticket.tokens

    def ended(self, ticket: Ticket, now: float, *, is_answered: bool) -> None:
        """However it ended."""
        ticket.is_over = True
        if is_answered:
            self.request_s += (1 - _FORGET) * (now - ticket.sent_at - self.request_s)
        self.ahead_s(now, self.rate or PREFILL)  # lets go of it, and of the request behind it

    def cached(self, ticket: Ticket, tokens: int) -> None:
        """What the engine says that it had of the ticket's prompt."""
        if ticket.cached > 0.0 and not ticket.is_hint:
            had = tokens / ticket.cached
            self.trust += (1 - _FORGET) * ((had if had < 1.0 else 1.0) - self.trust)
            if self.trust < _LEAST_TRUST:
                self.trust = _LEAST_TRUST

    def timed(self, timings: dict[str, Any]) -> None:
        """The engine's own figures of one request: prompt_n tokens in prompt_ms."""
        tokens, ms = timings.get("prompt_n"), timings.get("prompt_ms")
        if not isinstance(tokens, int | float) or not isinstance(ms, int | float) or tokens < _LEAST_PROMPT or ms <= 0:
            return
        before, took_s = self._measured
        self._measured = before, took_s = _FORGET * before + tokens, _FORGET * took_s + ms / 1000
        self.rate = before / took_s

    def reset(self) -> None:
        """Another process serves from here on: nothing of the old one's holds but how fast the node is."""
        self.trust = 1.0
        self.pending.clear()
        self._ahead = 0.0
