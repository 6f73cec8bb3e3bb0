"""From a request's body to the token ids that the model reads: chat template and tokenizer. No weights, no torch.

Blocking, and safe in several threads. The same in a host that answers and in one that only counts, so that they cannot
disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from helexa.core.errors import BadRequest, ContextLengthExceeded, HelexaError
from helexa.neuron.harness import infill, system_messages
from helexa.neuron.harness import openai_fields as fields
from helexa.neuron.harness.abilities import knows_tools
from helexa.neuron.harness.templates import conversation
from helexa.neuron.harness.tools_as_text import messages_with_tools, needs_text

Message = dict[str, Any]

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_NO_THOUGHTS: Final = ("none", "off")  # of reasoning_effort


class Template(Protocol):
    """What of a templates.template.ChatTemplate is used here."""

    @property
    def text(self) -> str: ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        values: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
    ) -> str: ...


class Prompts:
    """tokenizer: a tokenizers.Tokenizer. template: None where the model has none. model: its id, for errors.
    merges_system: system messages as one; None: where the template takes only one."""

    def __init__(
        self,
        tokenizer: Any,
        template: Template | None,
        *,
        model: str,
        context: int,
        merges_system: bool | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._model = model
        self._context = context
        self._knows_tools = template is not None and knows_tools(template.text)
        self._wants_nine = template is not None and conversation.wants_nine(template.text)
        self._merges_system = self._probe() if merges_system is None else merges_system

    def of_chat(self, body: bytes, asked: fields.ChatRequest) -> tuple[int, ...]:
        """body: what `asked` was read from. Raises what the request would be refused with."""
        return self.of_rendered(self.render(body, asked))

    def of_rendered(self, text: str) -> tuple[int, ...]:
        """text: from `render`. Raises ContextLengthExceeded."""
        return self._within(self._encode(text, special=False), "messages")

    def count_chat(self, body: bytes, asked: fields.ChatRequest) -> int:
        """Also of a prompt that is too long."""
        return len(self._encode(self.render(body, asked), special=False))

    def render(self, body: bytes, asked: fields.ChatRequest) -> str:
        if self.template is None:
            raise BadRequest(f"{self._model} has no chat template; load it with a `chat_template`.", param="messages")
        raw = _decode(body)
        messages: list[Message] = raw["messages"]
        tools = [_without_nulls(tool) for tool in raw.get("tools") or ()]
        if self._merges_system and system_messages.stand_apart(asked.messages or ()):
            messages = msgspec.json.decode(system_messages.merged(msgspec.json.encode(messages)))
        if needs_text(asked) and not self._knows_tools:
            messages = msgspec.json.decode(messages_with_tools(msgspec.json.encode(messages), asked))
            tools = []
        return self.template.render(
            [self._shown(message) for message in messages],
            tools=tools or None,
            values=_values(raw, asked),
            continue_final=_goes_on(messages[-1]),
        )

    def of_completion(self, asked: fields.CompletionRequest) -> list[tuple[int, ...]]:
        """One for each prompt."""
        if asked.suffix:
            return [self._within(self._filled_in(asked), "prompt")]
        return [self._within(tokens, "prompt") for tokens in self._each(asked.prompt)]

    def of_embedding(self, asked: fields.EmbeddingRequest) -> list[tuple[int, ...]]:
        return [self._within(tokens, "input", answer=0) for tokens in self._each(asked.input)]

    def _filled_in(self, asked: fields.CompletionRequest) -> tuple[int, ...]:
        """Prompt and suffix as the one text that the model was trained to fill in."""
        marks = next((marks for marks, text in infill.probes() if infill.has(self._encode(text, special=False))), None)
        if marks is None:
            raise BadRequest(
                f"`suffix` is not supported by {self._model}: it has no tokens for filling in between two texts.",
                param="suffix",
            )
        assert isinstance(asked.prompt, str)
        assert asked.suffix is not None
        return self._encode(marks.prompt(asked.prompt, asked.suffix), special=True)

    def _each(self, asked: str | list[Any] | None) -> list[tuple[int, ...]]:
        assert asked is not None
        if isinstance(asked, str):
            return [self._encode(asked, special=True)]
        if type(asked[0]) is int:
            return [tuple(asked)]
        return [tuple(one) if isinstance(one, list) else self._encode(one, special=True) for one in asked]

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """special: with what the tokenizer puts before and behind a text (a template writes those itself)."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def _within(self, tokens: tuple[int, ...], param: str, *, answer: int = 1) -> tuple[int, ...]:
        """answer: tokens that have to fit behind them."""
        if not tokens:
            raise BadRequest(f"`{param}` has no tokens in it: send some text.", param=param)
        if len(tokens) + answer > self._context:
            too_long = ContextLengthExceeded(self._model, len(tokens), self._context)
            too_long.param = param
            raise too_long
        return tokens

    def _shown(self, message: Message) -> Message:
        """As templates for text know messages: content as one text, and a developer's as the system's where the
        template does not name that role."""
        assert self.template is not None
        content = message.get("content")
        if isinstance(content, list) and all(part.get("type") == "text" for part in content):
            message = {**message, "content": "\n".join(part["text"] for part in content)}
        if message["role"] == "developer" and "developer" not in self.template.text:
            message = {**message, "role": "system"}
        if message.get("tool_calls") or message["role"] == "tool":
            message = conversation.with_mappings(message, nine=self._wants_nine)
        return message

    def _probe(self) -> bool:
        if self.template is None:
            return False
        try:
            rendered = self.template.render(_decode(system_messages.PROBE)["messages"])
        except HelexaError:
            return True
        return not system_messages.are_shown(rendered)


def _values(raw: Message, asked: fields.ChatRequest) -> dict[str, Any]:
    """Variables of the template beside its own. What the request says by name goes before what it implies."""
    values: dict[str, Any] = {}
    if asked.reasoning_effort is not None:
        values["reasoning_effort"] = asked.reasoning_effort
    if asked.reasoning_effort in _NO_THOUGHTS or raw.get("thinking_budget_tokens") == 0 or asked.forced_tool:
        values |= {"enable_thinking": False, "thinking": False}  # Qwen's and SmolLM3's name; DeepSeek's and Granite's
    return values | (asked.chat_template_kwargs or {})


def _goes_on(last: Message) -> bool:
    """An answer that is begun is gone on with, as llama.cpp's server does."""
    return last["role"] == "assistant" and not last.get("tool_calls") and bool(last.get("content"))


def _without_nulls(tool: Message) -> Message:
    """A function's keys that are null say nothing, and a template would write them out."""
    return {**tool, "function": {key: value for key, value in tool["function"].items() if value is not None}}
