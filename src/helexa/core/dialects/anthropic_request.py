"""A Messages request as the neuron's chat body. Pure: bytes in, bytes out.

The prompt is the application's: nothing is injected, trimmed or reordered. What is changed all the same, each of it
Anthropic's own rule or switched off by an option: consecutive turns of one role become one; a system block that changes
with every request (and would spoil the prompt cache) is left out; thinking that is not ours is left out; a result that
is an error says so in its text, because the chat dialect has no other place for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from helexa.core.bodies import decode
from helexa.core.dialects import anthropic_wire as wire
from helexa.core.dialects.anthropic_messages import MessagesBuilder, bad
from helexa.core.dialects.neuron_request import MAX_TOKENS, ChatBody, Options
from helexa.core.errors import BadRequest

MAX_STOP_SEQUENCES: Final = 16  # the neuron's bound

_EFFORTS: Final = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_THINKING: Final = frozenset({"enabled", "adaptive", "between_tools", "disabled"})
_DISPLAYS: Final = (None, "summarized", "updates", "omitted")  # all but the last show what the model thinks
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_CLEAR_THINKING: Final = "clear_thinking_20251015"
_INDEX: Final = re.compile(r"\[(\d+)\]")
_request = msgspec.json.Decoder(wire.Request)
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Translation(ChatBody):
    """max_tokens:    as asked; None where the request is only counted
    show_thinking: False: the client wants thinking blocks without their text
    """

    max_tokens: int | None
    show_thinking: bool


def translate(
    body: bytes, *, context: int | None = None, counting: bool = False, options: Options | None = None
) -> Translation:
    """context: tokens that a request to this model may have, where known: more than that is never asked for.
    counting: for count_tokens, which has no max_tokens. Raises BadRequest, naming the field in `param`."""
    asked = _read(body)
    return _Translator(asked, options or Options()).run(context=context, counting=counting)


def _read(body: bytes) -> wire.Request:
    try:
        return decode(_request, body)
    except BadRequest as error:
        if error.param is None:
            raise
        path = _INDEX.sub(r".\1", error.param)  # messages[0].content -> messages.0.content, as Anthropic writes it
        raise BadRequest(error.message.replace(f"`{error.param}`", path, 1), param=path) from None


class _Translator:
    """One request; used once."""

    def __init__(self, asked: wire.Request, options: Options) -> None:
        self._asked = asked
        self._options = options
        self._dropped: dict[str, None] = {}  # a set that keeps its order

    def run(self, *, context: int | None, counting: bool) -> Translation:
        asked = self._asked
        self._known_and_not_supported()
        if not asked.messages:
            raise bad("messages", "at least one message is required")
        tools = self._tools()
        made: dict[str, Any] = {
            "messages": self._messages(asked.messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,
        }
        if tools:
            made["tools"] = tools
        forced = self._tool_choice(made, tools)
        if not counting:
            made["max_tokens"] = min(_max_tokens(asked.max_tokens), context or MAX_TOKENS)
        self._sampling(made)
        self._thinking(made, forced=forced)
        self._output(made)
        if asked.metadata is not None and asked.metadata.user_id is not None:
            made["user"] = asked.metadata.user_id
        thinking = asked.thinking
        return Translation(
            fields=b"," + _encode(made)[1:],
            dropped=tuple(self._dropped),
            max_tokens=None if counting else asked.max_tokens,
            show_thinking=thinking is None or thinking.display != "omitted",
        )

    def _drop(self, name: str) -> None:
        self._dropped[name] = None

    def _known_and_not_supported(self) -> None:
        for name in wire.REFUSED:
            if getattr(self._asked, name) is not None:
                raise bad(name, "is not supported here; leave it out")
        for name in wire.DROPPED:
            value = getattr(self._asked, name)
            if value is not None and value not in wire.ORDINARY.get(name, ()):
                self._drop(name)

    def _messages(self, messages: Sequence[wire.Message]) -> list[dict[str, Any]]:
        built = MessagesBuilder(
            self._drop,
            keep_changing_blocks=self._options.keep_changing_blocks,
            thinking_turns=self._thinking_turns(),
        )
        built.system(self._asked.system)
        built.messages(messages)
        return built.finish()

    def _thinking_turns(self) -> int | None:
        """How many of the latest turns keep their thinking; None: all."""
        turns: int | None = None
        management = self._asked.context_management
        for i, edit in enumerate((management.edits or ()) if management is not None else ()):
            if edit.type != _CLEAR_THINKING:
                self._drop(f"context_management.{edit.type}")
                continue
            keep = edit.keep
            if keep is None:
                turns = 1
            elif isinstance(keep, str) or keep.type == "all":
                if isinstance(keep, str) and keep != "all":
                    raise bad(f"context_management.edits.{i}.keep", f"{keep!r} is not known; use all")
                turns = None
            elif keep.type != "thinking_turns" or keep.value is None or keep.value < 1:
                raise bad(f"context_management.edits.{i}.keep", "must be all, or thinking_turns with a value from 1 on")
            else:
                turns = keep.value
        return turns

    def _tools(self) -> list[dict[str, Any]]:
        made = []
        for i, tool in enumerate(self._asked.tools or ()):
            where = f"tools.{i}"
            if tool.type not in (None, "custom"):
                if self._options.refuse_hosted_tools:
                    raise bad(where, f"{tool.type} runs on Anthropic's servers only; leave it out")
                self._drop(tool.name or tool.type)
                continue
            if not tool.name:
                raise bad(f"{where}.name", "Field required")
            schema = bytes(tool.input_schema)
            if not schema:
                raise bad(f"{where}.input_schema", "Field required")
            if not schema.startswith(b"{"):
                raise bad(f"{where}.input_schema", "must be an object")
            function: dict[str, Any] = {"name": tool.name}
            if tool.description is not None:
                function["description"] = tool.description
            function["parameters"] = tool.input_schema
            if tool.strict is not None:
                function["strict"] = tool.strict
            for name in ("input_examples", "defer_loading"):
                if getattr(tool, name):
                    self._drop(f"tools.{name}")
            if tool.allowed_callers not in (None, ["direct"]):
                self._drop("tools.allowed_callers")
            made.append({"type": "function", "function": function})
        return made

    def _tool_choice(self, made: dict[str, Any], tools: Sequence[dict[str, Any]]) -> bool:
        """True where a call is forced."""
        choice = self._asked.tool_choice
        if choice is None:
            return False
        if choice.disable_parallel_tool_use is not None and tools:
            made["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        if choice.type == "tool":
            if not choice.name:
                raise bad("tool_choice.name", "Field required")
            names = [tool["function"]["name"] for tool in tools]
            if choice.name not in names:
                raise bad("tool_choice.name", f"{choice.name!r} is not among the tools that can be called here")
            made["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
            return True
        if choice.type not in _CHOICES:
            raise bad("tool_choice.type", f"{choice.type!r} is not known; use auto, any, tool or none")
        if choice.type == "any" and not tools:
            raise bad("tool_choice", "any needs at least one tool that can be called here")
        if tools:
            made["tool_choice"] = _CHOICES[choice.type]
        return choice.type == "any"

    def _sampling(self, made: dict[str, Any]) -> None:
        asked = self._asked
        if asked.temperature is not None:
            made["temperature"] = _between("temperature", asked.temperature, 0, 2)  # 1 is Anthropic's own; ours go on
        if asked.top_p is not None:
            made["top_p"] = _between("top_p", asked.top_p, 0, 1)
        if asked.top_k is not None:
            made["top_k"] = _between("top_k", asked.top_k, 0, MAX_TOKENS)
        if stops := asked.stop_sequences:
            if len(stops) > MAX_STOP_SEQUENCES:
                raise bad("stop_sequences", f"can have {MAX_STOP_SEQUENCES} texts, not {len(stops)}")
            if "" in stops:
                raise bad(f"stop_sequences.{stops.index('')}", "cannot be empty")
            made["stop"] = stops

    def _thinking(self, made: dict[str, Any], *, forced: bool) -> None:
        """The model's reasoning switch, budget and effort.

        1. Not asked for is off, as at Anthropic: reasoning that nobody wants to see eats the answer's tokens. 2. A
        forced call leaves no room to reason in. 3. between_tools is off too: it is about text, which stays text here.
        """
        thinking = self._asked.thinking
        kind = thinking.type if thinking is not None else "disabled"
        if kind not in _THINKING:
            known = ", ".join(sorted(_THINKING))
            raise bad("thinking.type", f"{kind!r} is not known; use one of {known}")
        on = kind in ("enabled", "adaptive") and not forced
        made["chat_template_kwargs"] = {"enable_thinking": on}
        if kind == "enabled" and thinking is not None:
            if thinking.budget_tokens is None:
                raise bad("thinking.budget_tokens", "Field required")
            if thinking.budget_tokens < 1:
                raise bad("thinking.budget_tokens", "must be at least 1")
            if on:
                made["thinking_budget_tokens"] = min(thinking.budget_tokens, MAX_TOKENS)
        if thinking is not None and thinking.display not in _DISPLAYS:
            self._drop("thinking.display")  # shown: clients have more names for it with every version

    def _output(self, made: dict[str, Any]) -> None:
        config = self._asked.output_config
        if config is not None and config.effort is not None:
            if config.effort not in _EFFORTS:
                raise bad("output_config.effort", f"{config.effort!r} is not known; use one of {', '.join(_EFFORTS)}")
            made["reasoning_effort"] = _EFFORTS[config.effort]
        if config is not None and config.task_budget is not None:
            self._drop("output_config.task_budget")
        where, wanted = "output_config.format", config.format if config is not None else None
        if wanted is None:
            where, wanted = "output_format", self._asked.output_format
        if wanted is None:
            return
        if wanted.type != "json_schema":
            raise bad(f"{where}.type", f"{wanted.type!r} is not known; use json_schema")
        if not bytes(wanted.schema).startswith(b"{"):
            raise bad(f"{where}.schema", "Field required: an object")
        schema = {"name": "output", "schema": wanted.schema, "strict": True}
        made["response_format"] = {"type": "json_schema", "json_schema": schema}


def _max_tokens(value: int | None) -> int:
    if value is None:
        raise bad("max_tokens", "Field required")
    if value < 1:
        raise bad("max_tokens", f"must be at least 1, not {value}")
    return min(value, MAX_TOKENS)


def _between(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise bad(name, f"must be {low:g} to {high:g}, not {value:g}")
    return value
