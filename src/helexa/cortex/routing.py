"""What the router is asked for requests that have several replicas to go to, and what it is told of them afterwards.

A model's router is made with the first request that finds two replicas: where there is one, nothing is read or hashed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import Final

from helexa.core.relay.contract import Exchange, Usage
from helexa.cortex import prefixes, router
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import Replica
from helexa.cortex.router import By, Choice, ModelRouter
from helexa.cortex.work import Ticket

# By which clients name a conversation (opencode, Claude Code); and by which they ask why a replica was chosen.
_HEADERS: Final = re.compile(
    rb"\r\nx-(session-id|session-affinity|claude-code-session-id|helexa-explain):[ \t]*([^\r\n]{1,256})"
)
_EXPLAIN: Final = b"helexa-explain"
_UNPRINTABLE: Final = re.compile(rb"[^ -~]")
_NO_USAGE: Final = Usage()
_SHOWN: Final = 12  # replicas in an explanation


class Routing:
    """counted: told each choice, with the model's id."""

    def __init__(self, rng: Random, clock: Callable[[], float], counted: Callable[[str, By], None]) -> None:
        self.rng = rng
        self.clock = clock
        self.counted = counted
        self._models: dict[str, ModelRouter] = {}

    def read(self, exchange: Exchange, model_id: str, body: bytes) -> Routed:
        """HOT. Once for a request that may have a choice. body: what the nodes will be asked with, if the client's own
        is translated: blocks that change with every request are not in it."""
        session, explains = None, False
        for name, value in _HEADERS.findall(exchange.head.lower()):
            if name == _EXPLAIN:
                explains = True
            elif session is None:
                session = value.decode("latin-1")
        prompt = prefixes.read(body, model_id, session)
        model = self._models.get(model_id)
        if model is None:
            model = self._models[model_id] = ModelRouter()
        return Routed(self, model_id, model, prompt, explains=explains)

    def view_changed(self, model_id: str, fleet: Fleet) -> None:
        """A replica that is not in the live list has lost its prompts, or will have when it is back."""
        model = self._models.get(model_id)
        if model is not None:
            model.keep_only(fleet.replicas(model_id))


class Routed:
    """One request to a model with several replicas."""

    __slots__ = ("_choice", "_explains", "_model", "_model_id", "_reason", "_routing", "prompt")

    def __init__(
        self, routing: Routing, model_id: str, model: ModelRouter, prompt: prefixes.Prompt | None, *, explains: bool
    ) -> None:
        self._routing = routing
        self._model_id = model_id
        self._model = model
        self.prompt = prompt
        self._explains = explains
        self._choice: Choice | None = None
        self._reason = b""  # the header line that says why, where the client asked for it

    def choose(self, replicas: Sequence[Replica], tried: Collection[str]) -> Replica | None:
        """HOT. As router.choose, of which it is the one for prompts."""
        routing, prompt = self._routing, self.prompt
        if prompt is None:
            return router.choose(replicas, tried, routing.rng)
        now = routing.clock()
        self._choice = choice = self._model.choose(replicas, tried, prompt, now, routing.rng)
        if choice is None:
            return None
        if self._explains:
            weighed = self._model.weigh(replicas, tried, prompt, now)
            text = f"{choice.replica.node.name} by {choice.by}: " + "; ".join(map(str, weighed[:_SHOWN]))
            self._reason = b"x-helexa-route: " + _UNPRINTABLE.sub(b"?", text.encode("ascii", "replace")) + b"\r\n"
        return choice.replica

    def sent(self, exchange: Exchange, replica: Replica) -> Ticket | None:
        """It goes to this replica. The ticket, where that was our choice, goes to `ended`."""
        choice = self._choice
        if choice is None or choice.replica is not replica:
            return None
        if self._reason:
            exchange.headers_back += self._reason  # which are made anew for each attempt
        routing = self._routing
        routing.counted(self._model_id, choice.by)
        return self._model.sent(choice, exchange, routing.clock(), is_told=exchange.stream)

    def ended(self, exchange: Exchange, ticket: Ticket) -> None:
        usage = exchange.usage or _NO_USAGE
        self._model.ended(
            ticket, self._routing.clock(), prompt_tokens=usage.prompt_tokens, cached_tokens=usage.cached_tokens
        )
