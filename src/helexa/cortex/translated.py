"""What a dialect that nodes do not speak has to say about one request, and who writes down what its answer told.

A request is translated once, whatever number of nodes is tried; each attempt has an answer of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from helexa.core.dialects import neuron_chat
from helexa.core.dialects.neuron_request import Options
from helexa.core.dialects.node_errors import Naming
from helexa.core.lifecycle import ModelInfo
from helexa.core.relay.contract import Exchange, Mend, Reply, Usage
from helexa.cortex.response_store import MemoryStore, ResponseStore


@dataclass(frozen=True, slots=True)
class Setup:
    """What was configured, and what is kept between requests."""

    options: Options = field(default_factory=Options)
    responses: ResponseStore = field(
        default_factory=lambda: MemoryStore(max_bytes=64 << 20, age_s=3600, clock=monotonic)
    )


class Translated(ABC):
    """One request; a dialect overrides what is its own."""

    @property
    @abstractmethod
    def naming(self) -> Naming:
        """Of the chat body's fields, for what a node refuses."""

    @abstractmethod
    def body(self, model: str) -> bytes:
        """For a node that calls the model so."""

    def ask(self, info: ModelInfo) -> tuple[str | None, bytes]:
        """What a node is asked that has this model loaded: the path, where it is not the endpoint's own, and the body.
        Raises BadRequest for what only the loaded model could tell."""
        return None, self.body(info.id)

    @abstractmethod
    def answer(self, exchange: Exchange) -> Mend | None:
        """For one attempt. None: the node's answer is the client's as it is."""

    def content_type(self, exchange: Exchange) -> bytes | None:
        """Of what `answer` makes. None: the node's own, which is always asked for a stream."""
        return None if exchange.stream else b"application/json"

    def reply(self, exchange: Exchange, *, is_loaded: bool) -> Reply | None:
        """The answer, where no node has to be asked for it. Asked for at first, and again once the model is loaded."""
        return None

    def over(self, exchange: Exchange) -> None:  # noqa: B027 - most have nothing to do then
        """The exchange is over, however it ended."""


class Witness:
    """Writes into the Exchange what the relay finds in other streams by itself."""

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def first_token(self) -> None:
        if not self._exchange.t_first_token:
            self._exchange.t_first_token = monotonic()

    def ended(self, usage: neuron_chat.Usage | None, finish_reason: str | None, timings: dict[str, Any] | None) -> None:
        exchange = self._exchange
        exchange.finish_reason = finish_reason
        exchange.timings = timings
        if usage is not None:
            exchange.usage = Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
