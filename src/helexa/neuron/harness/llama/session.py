"""One loaded GGUF model, seen from the daemon: what of a request the engine may see, and how its answer is mended.

Pure but for `learn` and `count_tokens`. A stream that llama.cpp's server answers rightly passes untouched; a request
that it does not answer rightly is rewritten by splices, and its answer goes through a mend (mends.py says which). An
answer in one piece is always asked as a stream and collected by its mend.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec

from helexa.core.errors import BadRequest, HelexaError
from helexa.core.relay.contract import Exchange
from helexa.core.relay.upstream import Upstream
from helexa.neuron.harness import infill, openai_lists, openai_parts, openai_tasks, system_messages
from helexa.neuron.harness import openai_fields as fields
from helexa.neuron.harness.base import Plan, Prepared
from helexa.neuron.harness.collect import Collector
from helexa.neuron.harness.llama import refusals
from helexa.neuron.harness.llama.geometry import Geometry
from helexa.neuron.harness.llama.mends import AnswerMend, Echo, Reasoning, RerankMend, Step, Stops, TopLogprobs, Usages
from helexa.neuron.harness.llama.mends_embeddings import Cut
from helexa.neuron.harness.llama.mends_logprobs import CompletionLogprobs
from helexa.neuron.harness.llama.mends_tools import WrittenCalls, call_schema
from helexa.neuron.harness.splice import members, prepend, splice
from helexa.neuron.harness.tools_as_text import messages_with_tools, needs_text

CHAT: Final = openai_lists.CHAT
COMPLETIONS: Final = openai_lists.COMPLETIONS
EMBEDDINGS: Final = openai_lists.EMBEDDINGS
RERANK: Final = openai_lists.RERANK

_TRUE: Final = b"true"
_NULL: Final = b"null"
_USAGE_ON: Final = b'{"include_usage":true}'
_JSON: Final = b"application/json"
_KNOWN_ABSENT: Final = frozenset({"stream", "stream_options", "return_progress"})  # where UNSET says so
_encode = msgspec.json.Encoder().encode
LEARN_S: Final = 5.0


class _Rendered(msgspec.Struct):
    prompt: str


class _Tokenized(msgspec.Struct):
    tokens: list[Any]


class LlamaSession:
    """Belongs to the daemon's loop. One for each loaded model, shared by all its requests."""

    def __init__(self, plan: Plan) -> None:
        self._model = plan.request.id
        self._task = plan.facts.task
        self._slots = plan.slots
        self._context = plan.context
        self._abilities = frozenset(plan.facts.capabilities)
        geometry: Geometry | None = plan.facts.extra.get("geometry")
        self._n_embd = geometry.n_embd if geometry is not None else None
        self._merges_system = plan.request.merge_system  # None: not known yet
        self._infill: infill.Marks | None = None
        self._prepare: dict[str, Callable[[Exchange], Prepared]] = {
            CHAT: self._chat,
            COMPLETIONS: self._completion,
            EMBEDDINGS: self._embedding,
            RERANK: self._rerank,
        }

    async def learn(self, engine: Upstream) -> None:
        """Whether the chat template takes system messages as they stand, and how the model fills in."""
        try:
            async with asyncio.timeout(LEARN_S):
                await self._learn_infill(engine)
        except (OSError, TimeoutError, ValueError):
            pass  # as below
        if self._merges_system is None and self._task == "chat":
            try:
                answer = await engine.fetch("POST", "/apply-template", system_messages.PROBE, timeout_s=LEARN_S)
                rendered = answer.json(_Rendered).prompt if answer.status == 200 else ""
            except (OSError, TimeoutError, ValueError):  # not JSON is a ValueError too
                return  # an engine that does not answer: its end is noticed elsewhere
            self._merges_system = not system_messages.are_shown(rendered)

    async def _learn_infill(self, engine: Upstream) -> None:
        if self._task not in openai_tasks.TASKS[COMPLETIONS]:
            return
        for marks, text in infill.probes():
            order = _encode({"content": text, "add_special": False, "parse_special": True})
            answer = await engine.fetch("POST", "/tokenize", order)
            if answer.status == 200 and infill.has(answer.json(_Tokenized).tokens):
                self._infill = marks
                return

    def prepare(self, exchange: Exchange) -> Prepared:
        """HOT for a chat: one decode of the fields we judge, and one splice."""
        path = exchange.endpoint.upstream_path
        openai_tasks.check(self._model, self._task, path)
        return self._prepare[path](exchange)

    def refusal(self, exchange: Exchange, status: int, body: bytes) -> HelexaError | None:
        """The engine's own error in our taxonomy."""
        return refusals.translate(self._model, exchange.endpoint.upstream_path, status, body, exchange.body)

    def check_chats(self) -> None:
        openai_tasks.check(self._model, self._task, CHAT)

    async def count_tokens(self, body: bytes, engine: Upstream) -> int:
        """Prompt tokens of a chat body as its own request would have them: the same rewriting, the engine's own
        template and tokenizer. Raises what the request itself would."""
        self.check_chats()
        asked = self._read_chat(body)
        openai_parts.check_countable(asked)
        rendered = await self._ask(engine, "/apply-template", splice(body, self._shown(body, asked)))
        order = _encode({"content": rendered["prompt"], "add_special": True, "parse_special": True})
        return len((await self._ask(engine, "/tokenize", order))["tokens"])

    async def _ask(self, engine: Upstream, path: str, body: bytes) -> dict[str, Any]:
        answer = await engine.fetch("POST", path, body)
        if answer.status != 200:
            raise refusals.translate(self._model, CHAT, answer.status, answer.body, body)
        found: dict[str, Any] = answer.json(dict[str, Any])
        return found

    # chat

    def _read_chat(self, body: bytes) -> fields.ChatRequest:
        asked = fields.read_chat(body, max_choices=self._slots, context=self._context)
        openai_parts.check(self._model, self._abilities, asked.messages or ())
        return asked

    def _chat(self, exchange: Exchange) -> Prepared:
        asked = self._read_chat(exchange.body)
        values = self._shown(exchange.body, asked)
        steps: list[Step] = []
        if asked.forced_tool or (asked.tools and (asked.wants_json or "tools" not in self._abilities)):
            more, steps = self._tools(asked)
            values |= more
        if asked.logprobs:
            if not asked.top_logprobs:  # with 0 the engine gives no log-probabilities at all, without it 20 each
                values["top_logprobs"] = b"1"
            steps.append(TopLogprobs(asked.top_logprobs or 0))
        return self._mended(exchange, asked, values, steps, prompts=1)

    def _tools(self, asked: fields.ChatRequest) -> tuple[dict[str, bytes], list[Step]]:
        """What the engine is asked so that calls come about, and the step that reads them back.

        1. No call may be made: nothing more. 2. A call is forced: a response format binds the model to it, which the
        engine itself does not. 3. A call or an answer by a schema: one response format for both, because the engine
        would let the schema alone. 4. A call or text.
        """
        functions = [tool.function for tool in asked.tools or () if tool.function is not None]
        if not functions or asked.tool_choice == "none":  # 1
            return {}, []
        if asked.grammar:
            raise BadRequest("`grammar` and `tools` exclude each other; send one.", param="grammar")
        if not asked.forced_tool and asked.wanted_schema is None:
            # 4; any JSON object (type json_object) leaves room for a call as it is
            return {}, [WrittenCalls([f.name for f in functions], must=False)]
        named = fields.called_function(asked)
        calls = [(f.name, f.schema) for f in functions if named is None or f.name == named]
        try:
            schema = call_schema(calls, None if asked.forced_tool else asked.wanted_schema)  # 2, 3
        except RecursionError:
            raise BadRequest("`tools`: a schema is nested too deeply.", param="tools") from None
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        values = {"response_format": _encode(wanted), "tool_choice": b'"none"'}
        if asked.json_schema is not None:
            values["json_schema"] = _NULL
        return values, [WrittenCalls([f.name for f in functions], must=asked.forced_tool)]

    def _shown(self, body: bytes, asked: fields.ChatRequest) -> dict[str, bytes]:
        """What must change in the body so that the template shows all of it; in most requests nothing.

        1. System messages as one where the template takes only one. 2. Tools, calls and results as text where it knows
        no tools. 3. A tool's key that is null (`llm` sends them) left out: the engine refuses it.
        """
        values: dict[str, bytes] = {}
        merges = self._merges_system and system_messages.stand_apart(asked.messages or ())
        as_text = "tools" not in self._abilities and needs_text(asked)
        if merges or as_text:
            raw = _value(body, "messages")
            if merges:  # 1
                raw = system_messages.merged(raw)
            values["messages"] = messages_with_tools(raw, asked) if as_text else raw  # 2
        if as_text:
            if asked.tools is not None:
                values["tools"] = _NULL
            if asked.tool_choice is not None:
                values["tool_choice"] = _NULL
        elif any(tool.function is not None and tool.function.has_nulls for tool in asked.tools or ()):  # 3
            values["tools"] = _without_nulls(_value(body, "tools"))
        return values

    # completions

    def _completion(self, exchange: Exchange) -> Prepared:
        asked = fields.read_completion(exchange.body, max_choices=self._slots, context=self._context)
        values: dict[str, bytes] = {}
        steps: list[Step] = []
        if asked.logprobs is not None:
            if asked.logprobs == 0:
                values["logprobs"] = b"1"  # with 0 the engine gives none
            steps.append(CompletionLogprobs(asked.logprobs))
        if asked.response_format is not None and asked.wants_json:
            # The engine reads it for chat only; `json_schema` means the same here.
            schema = asked.wanted_schema
            values["json_schema"] = _encode(schema if schema is not None else {"type": "object"})
        if asked.echo:
            steps.append(Echo(asked.texts or [], per_prompt=asked.n or 1))
        if asked.suffix:
            values |= {"prompt": self._filled_in(asked), "suffix": _NULL}
        prompts = len(asked.prompt) if isinstance(asked.prompt, list) and type(asked.prompt[0]) is not int else 1
        return self._mended(exchange, asked, values, steps, prompts=prompts)

    def _filled_in(self, asked: fields.CompletionRequest) -> bytes:
        """Prompt and suffix as the one text that the model was trained to fill in."""
        if self._infill is None:
            raise BadRequest(
                f"`suffix` is not supported by {self._model}: it has no tokens for filling in between two texts.",
                param="suffix",
            )
        assert isinstance(asked.prompt, str)
        assert asked.suffix is not None
        return _encode(self._infill.prompt(asked.prompt, asked.suffix))

    def _mended(
        self, exchange: Exchange, asked: fields.Generation, values: dict[str, bytes], steps: list[Step], *, prompts: int
    ) -> Prepared:
        """HOT. Adds what chat and completions share, and settles how the engine is asked.

        Always for a stream, and always for the progress of its prefill: the engine notices a client that left only
        where a write to it fails (a whole answer it would finish for nobody), and a progress event is a write a batch.
        """
        is_chat = isinstance(asked, fields.ChatRequest)
        stream = exchange.stream
        usage = asked.wants_usage or exchange.gateway_usage or not stream
        if asked.stop:
            values["verbose"] = _TRUE
            steps.append(Stops(asked.stops))
        n = asked.n or 1
        if n * prompts > 1:
            steps.append(Usages(per_prompt=n, wanted=usage))
        if is_chat and usage and "reasoning" in self._abilities:
            values["timings_per_token"] = _TRUE
            steps.append(Reasoning(timings_asked=bool(asked.timings_per_token)))
        if not stream:
            values["stream"] = _TRUE
        if usage and not asked.wants_usage:
            values["stream_options"] = _USAGE_ON
        if asked.return_progress is not True:
            values["return_progress"] = _TRUE
        return Prepared(
            body=_spliced(exchange.body, asked, values),
            mend=self._mend(exchange, steps),
            first_event=is_chat and stream,
            dropped=openai_lists.dropped(asked, exchange.endpoint.upstream_path),
            content_type=None if stream else _JSON,
            cut_progress=stream and asked.return_progress is not True,
        )

    def _mend(self, exchange: Exchange, steps: list[Step]) -> AnswerMend | None:
        if exchange.stream:
            return AnswerMend(steps) if steps else None
        path = exchange.endpoint.upstream_path
        refuse = partial(refusals.translate, self._model, path, 500, asked=exchange.body)
        return AnswerMend(steps, Collector(), refuse)

    # embeddings and rerank

    def _embedding(self, exchange: Exchange) -> Prepared:
        asked = fields.read_embedding(exchange.body)
        body = None
        if asked.encoding_format is None and b'"encoding_format"' in exchange.body:
            body = splice(exchange.body, {"encoding_format": b'"float"'})  # null the engine refuses
        return Prepared(body=body, mend=self._cut(asked.dimensions))

    def _cut(self, dimensions: int | None) -> Cut | None:
        """How an answer comes to the dimensions that were asked for."""
        cuts = openai_parts.must_cut(self._model, self._abilities, self._n_embd, dimensions)
        return Cut(dimensions) if cuts and dimensions is not None else None

    def _rerank(self, exchange: Exchange) -> Prepared:
        asked = fields.read_rerank(exchange.body)
        documents = asked.documents or []
        body = None
        if any(isinstance(document, dict) for document in documents):
            body = splice(exchange.body, {"documents": _encode([fields.text_of(d) for d in documents])})
        mend = RerankMend(documents) if asked.return_documents else None
        return Prepared(body=body, mend=mend, dropped=openai_lists.dropped(asked, RERANK))


def _spliced(body: bytes, asked: fields.Generation, values: dict[str, bytes]) -> bytes | None:
    """HOT. None: unchanged. Keys that the decoding found absent need no search for their spans."""
    if not values:
        return None
    if values.keys() <= _KNOWN_ABSENT and all(getattr(asked, key) is msgspec.UNSET for key in values):
        return prepend(body, values)
    return splice(body, values)


def _value(body: bytes, wanted: str) -> bytes:
    """The raw value of a key that is there; of several the last, as decoders have it."""
    return next(body[start:end] for key, start, end in reversed(list(members(body))) if key == wanted)


def _without_nulls(tools: bytes) -> bytes:
    """The functions without their keys that are null; what is in the others stays as it was written."""
    made: list[dict[str, Any]] = msgspec.json.decode(tools, type=list[dict[str, msgspec.Raw]])
    for tool in made:
        function = msgspec.json.decode(tool["function"], type=dict[str, msgspec.Raw])
        tool["function"] = {key: value for key, value in function.items() if bytes(value) != _NULL}
    return _encode(made)
