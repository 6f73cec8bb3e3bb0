"""A Responses request as the neuron's chat body. Pure: bytes in, bytes out.

The prompt is the application's: nothing is injected, trimmed or reordered. `developer` is told to templates as
`system`, the word that they know; reasoning that is not ours is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from helexa.core.bodies import decode
from helexa.core.dialects import responses_wire as wire
from helexa.core.dialects.neuron_request import MAX_TOKENS, ChatBody, Options
from helexa.core.dialects.responses_input import MessagesBuilder
from helexa.core.dialects.responses_names import Places
from helexa.core.dialects.responses_tools import Called, Tools, bad

MAX_TOP_LOGPROBS: Final = 20
MAX_METADATA: Final = 16

_EFFORTS: Final = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_NO_EFFORT: Final = frozenset({"none", "minimal"})
_SUMMARIES: Final = frozenset({"auto", "concise", "detailed"})
_VERBOSITIES: Final = frozenset({"low", "medium", "high"})
_request = msgspec.json.Decoder(wire.Request)
_encode = msgspec.json.Encoder().encode


class _AsSent(msgspec.Struct):
    """What the answer repeats in the client's own bytes."""

    tools: list[msgspec.Raw] | None = None
    tool_choice: msgspec.Raw = msgspec.Raw(b"null")
    text: msgspec.Raw = msgspec.Raw(b"null")
    reasoning: msgspec.Raw = msgspec.Raw(b"null")


_as_sent = msgspec.json.Decoder(_AsSent).decode


@dataclass(frozen=True, slots=True)
class Translation(ChatBody):
    """called:        what each function's name means to the client
    places:        what the client calls the chat body's fields
    echo:          members of the response object that repeat the request; no braces, no comma at either end
    show_summary:  reasoning is shown as a summary, which is what the client asked for; else as it is
    seal:          reasoning items bear an encrypted_content, which the client will send back
    logprobs:      the client wants the log-probabilities
    store:         the response is kept
    """

    called: dict[str, Called]
    places: Places
    echo: bytes
    show_summary: bool = False
    seal: bool = False
    logprobs: bool = False
    store: bool = True


def read(body: bytes) -> wire.Request:
    """Raises BadRequest."""
    return decode(_request, body)


def translate(
    asked: wire.Request,
    body: bytes,
    *,
    history: Sequence[wire.Item] = (),
    context: int | None = None,
    options: Options | None = None,
) -> Translation:
    """asked: what `read` made of the body, references in its input resolved.   history: what previous_response_id
    continues.   context: tokens that a request to this model may have, where known: more than that is never asked for.
    Raises BadRequest, naming the field in `param`."""
    return _Translator(asked, options or Options()).run(body, history, context)


class _Translator:
    """One request; used once."""

    def __init__(self, asked: wire.Request, options: Options) -> None:
        self._asked = asked
        self._dropped: dict[str, None] = {}  # a set that keeps its order
        self._tools = Tools(self._drop, refuse_hosted=options.refuse_hosted_tools)
        self._given: list[int] = []  # which of `tools` the model is given; the response repeats these alone

    def _drop(self, name: str) -> None:
        self._dropped[name] = None

    def run(self, body: bytes, history: Sequence[wire.Item], context: int | None) -> Translation:
        asked = self._asked
        self._known_and_not_supported()
        messages = MessagesBuilder(self._drop)
        if asked.instructions is not None:
            messages.instructions(asked.instructions)
        messages.items(history, "previous_response_id")
        if isinstance(asked.input, str):
            messages.text(asked.input)
        elif asked.input is not None:
            messages.items(asked.input)
        made: dict[str, Any] = {
            "messages": messages.finish(),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,
        }
        if not made["messages"]:
            raise bad("input", "is required: a text, or a list with at least one item")
        forced = self._tool_fields(made)
        self._sampling(made, context)
        self._reasoning(made, forced=forced)
        self._text(made)
        include = frozenset(self._included())
        if (user := asked.safety_identifier or asked.user) is not None:
            made["user"] = user
        if asked.prompt_cache_key is not None:
            made["prompt_cache_key"] = asked.prompt_cache_key  # the router's hint
        if asked.metadata is not None and len(asked.metadata) > MAX_METADATA:
            raise bad("metadata", f"can have {MAX_METADATA} keys, not {len(asked.metadata)}")
        reasoning = asked.reasoning
        return Translation(
            fields=b"," + _encode(made)[1:],
            dropped=tuple(self._dropped),
            called=self._tools.called,
            places=Places(tuple(messages.places), tuple(self._tools.places)),
            echo=self._echo(_as_sent(body)),
            show_summary=reasoning is not None and (reasoning.summary or reasoning.generate_summary) is not None,
            seal="reasoning.encrypted_content" in include,
            logprobs="logprobs" in made,
            store=asked.store is not False,
        )

    def _known_and_not_supported(self) -> None:
        for name in wire.REFUSED:
            if getattr(self._asked, name) not in (None, False):
                raise bad(name, "is not supported here; leave it out")
        for name in wire.DROPPED:
            value = getattr(self._asked, name)
            if value is not None and value not in wire.ORDINARY.get(name, ()):
                self._drop(name)

    def _included(self) -> Sequence[str]:
        for name in self._asked.include or ():
            if name not in wire.INCLUDED:
                self._drop(f"include.{name}")
        return self._asked.include or ()

    def _tool_fields(self, made: dict[str, Any]) -> bool:
        """True where a call is forced."""
        asked, tools = self._asked, self._tools
        self._given = tools.read(asked.tools or ())
        for i, item in enumerate(asked.input if isinstance(asked.input, list) else ()):
            if item.type == "additional_tools":
                tools.read(item.tools or (), f"input[{i}].tools")
        choice, forced = tools.choose(asked.tool_choice)
        if tools.functions:
            made["tools"] = tools.functions
            if choice is not None:
                made["tool_choice"] = choice
            if asked.parallel_tool_calls is not None:
                made["parallel_tool_calls"] = asked.parallel_tool_calls
        return forced

    def _sampling(self, made: dict[str, Any], context: int | None) -> None:
        asked = self._asked
        if asked.temperature is not None:
            made["temperature"] = _between("temperature", asked.temperature, 0, 2)
        if asked.top_p is not None:
            made["top_p"] = _between("top_p", asked.top_p, 0, 1)
        if (most := asked.max_output_tokens) is not None:
            if most < 1:
                raise bad("max_output_tokens", f"must be at least 1, not {most}")
            made["max_tokens"] = min(most, context or MAX_TOKENS, MAX_TOKENS)
        if asked.top_logprobs or "message.output_text.logprobs" in (asked.include or ()):
            made["logprobs"] = True
        if asked.top_logprobs is not None:
            top = _between("top_logprobs", asked.top_logprobs, 0, MAX_TOP_LOGPROBS)
            if "logprobs" in made:
                made["top_logprobs"] = top

    def _reasoning(self, made: dict[str, Any], *, forced: bool) -> None:
        """The template's reasoning switch and effort. Not asked for is the template's own way; a forced call leaves no
        room to reason in."""
        asked = self._asked.reasoning
        effort = asked.effort if asked is not None else None
        if effort is not None:
            if effort not in _EFFORTS and effort not in _NO_EFFORT:
                raise bad("reasoning.effort", f"{effort!r} is not known; use none, minimal, {', '.join(_EFFORTS)}")
            if effort in _EFFORTS:
                made["reasoning_effort"] = _EFFORTS[effort]
        if forced or effort in _NO_EFFORT:
            made["chat_template_kwargs"] = {"enable_thinking": False}
        elif effort is not None:
            made["chat_template_kwargs"] = {"enable_thinking": True}
        if asked is None:
            return
        for name in ("summary", "generate_summary"):
            if (value := getattr(asked, name)) is not None and value not in _SUMMARIES:
                raise bad(f"reasoning.{name}", f"{value!r} is not known; use auto, concise or detailed")
        if asked.context not in (None, "auto", "all_turns"):
            self._drop("reasoning.context")
        if asked.mode not in (None, "standard"):
            self._drop("reasoning.mode")

    def _text(self, made: dict[str, Any]) -> None:
        text = self._asked.text
        if text is None:
            return
        if text.verbosity is not None:
            if text.verbosity not in _VERBOSITIES:
                raise bad("text.verbosity", f"{text.verbosity!r} is not known; use low, medium or high")
            if text.verbosity != "medium":
                self._drop("text.verbosity")
        wanted = text.format
        if wanted is None or wanted.type == "text":
            return
        if wanted.type == "json_object":
            made["response_format"] = {"type": "json_object"}
            return
        if wanted.type != "json_schema":
            raise bad("text.format.type", f"{wanted.type!r} is not known; use text, json_object or json_schema")
        if not bytes(wanted.schema).startswith(b"{"):
            raise bad("text.format.schema", "is required: an object")
        schema: dict[str, Any] = {"name": wanted.name or "output", "schema": wanted.schema}
        if wanted.description is not None:
            schema["description"] = wanted.description
        if wanted.strict is not None:
            schema["strict"] = wanted.strict
        made["response_format"] = {"type": "json_schema", "json_schema": schema}

    def _echo(self, sent: _AsSent) -> bytes:
        asked = self._asked
        parallel = asked.parallel_tool_calls
        members: dict[str, Any] = {
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": parallel if parallel is not None else True,
            "previous_response_id": asked.previous_response_id,
            "reasoning": _one_line(sent.reasoning, b'{"effort":null,"summary":null}'),
            "service_tier": "default",
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "text": _one_line(sent.text, b'{"format":{"type":"text"}}'),
            "tool_choice": _one_line(sent.tool_choice, b'"auto"'),
            "tools": [_one_line((sent.tools or [])[i]) for i in self._given],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "background": False,
        }
        for name in ("prompt_cache_key", "safety_identifier", "user"):
            if (value := getattr(asked, name)) is not None:  # OpenAI's description has no null here
                members[name] = value
        return _encode(members)[1:-1]


def _one_line(raw: msgspec.Raw, default: bytes = b"null") -> msgspec.Raw:
    """An event's data has no line breaks.   default: in place of null."""
    data = bytes(raw)
    if data == b"null":
        return msgspec.Raw(default)
    return raw if b"\n" not in data and b"\r" not in data else msgspec.Raw(msgspec.json.format(data, indent=-1))


def _between(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise bad(name, f"must be {low:g} to {high:g}, not {value:g}")
    return value
