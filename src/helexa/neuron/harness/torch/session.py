"""One loaded safetensors model, seen from the daemon: is it this model's to answer, and is usage to be told?

All else is the host's (server.py), which speaks the neuron's dialect itself: what it is sent, and what it answers,
passes untouched. Pure but for `count_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from helexa.core.dialects.node_errors import from_answer
from helexa.core.errors import HelexaError
from helexa.core.relay.contract import Exchange
from helexa.core.relay.upstream import Upstream
from helexa.neuron.harness import openai_fields as fields
from helexa.neuron.harness import openai_lists, openai_parts, openai_tasks
from helexa.neuron.harness.base import Plan, Prepared
from helexa.neuron.harness.openai_lists import CHAT, COMPLETIONS, EMBEDDINGS
from helexa.neuron.harness.splice import prepend, splice
from helexa.neuron.harness.torch.config import ModelConfig
from helexa.neuron.harness.torch.server import COUNT


class _Counted(msgspec.Struct):
    input_tokens: int


_USAGE_ON: Final = {"stream_options": b'{"include_usage":true}'}


class TorchSession:
    """Belongs to the daemon's loop. One for each loaded model, shared by all its requests."""

    def __init__(self, plan: Plan) -> None:
        config: ModelConfig = plan.facts.extra["config"]
        self._model = plan.request.id
        self._task = plan.facts.task
        self._slots = plan.slots
        self._context = plan.context
        self._abilities = frozenset(plan.facts.capabilities)
        self._dimensions = config.hidden
        self._prepare: dict[str, Callable[[Exchange], Prepared]] = {
            CHAT: self._chat,
            COMPLETIONS: self._completion,
            EMBEDDINGS: self._embedding,
        }

    async def learn(self, engine: Upstream) -> None:
        """Its files have told all."""

    def prepare(self, exchange: Exchange) -> Prepared:
        """HOT for a chat: one decode of the fields we judge."""
        path = exchange.endpoint.upstream_path
        openai_tasks.check(self._model, self._task, path)
        return self._prepare[path](exchange)

    def refusal(self, exchange: Exchange, status: int, body: bytes) -> HelexaError | None:
        """The host's errors are in our taxonomy already."""
        return None

    def check_chats(self) -> None:
        openai_tasks.check(self._model, self._task, CHAT)

    async def count_tokens(self, body: bytes, engine: Upstream) -> int:
        self.check_chats()
        openai_parts.check_countable(fields.read_chat(body, max_choices=self._slots, context=self._context))
        answer = await engine.fetch("POST", COUNT, body)
        if answer.status != 200:
            raise from_answer(answer.status, answer.body)
        counted: _Counted = answer.json(_Counted)
        return counted.input_tokens

    def _chat(self, exchange: Exchange) -> Prepared:
        asked = fields.read_chat(exchange.body, max_choices=self._slots, context=self._context)
        openai_parts.check(self._model, self._abilities, asked.messages or ())
        return self._generation(exchange, asked)

    def _completion(self, exchange: Exchange) -> Prepared:
        return self._generation(
            exchange, fields.read_completion(exchange.body, max_choices=self._slots, context=self._context)
        )

    def _generation(self, exchange: Exchange, asked: fields.Generation) -> Prepared:
        body = None
        if exchange.gateway_usage and exchange.stream and not asked.wants_usage:
            absent = asked.stream_options is msgspec.UNSET
            body = prepend(exchange.body, _USAGE_ON) if absent else splice(exchange.body, _USAGE_ON)
        return Prepared(body=body, dropped=openai_lists.dropped(asked, exchange.endpoint.upstream_path))

    def _embedding(self, exchange: Exchange) -> Prepared:
        asked = fields.read_embedding(exchange.body)
        openai_parts.must_cut(self._model, self._abilities, self._dimensions, asked.dimensions)  # the host does
        return Prepared()
