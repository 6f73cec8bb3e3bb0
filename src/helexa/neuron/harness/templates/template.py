"""A chat template: a conversation in, the prompt out, as transformers' apply_chat_template makes it, byte for byte.

Thread-safe; a rendering runs in its caller's thread, and is ended with an error when it goes beyond its Budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2

from helexa.core.errors import BadRequest, HelexaError, TemplateFailed
from helexa.neuron.harness import template_refusals
from helexa.neuron.harness.templates.budget import RENDERED, Budget, TooExpensive, spending
from helexa.neuron.harness.templates.sandbox import SOURCE, Environment, Raised, variables

Message = Mapping[str, Any]

_TAG: Final = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where the last message ends
# What reasoning is passed as: clients, and templates, differ.
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
_OWN: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template"})


class TemplateBroken(Exception):
    """The template is none. str() says why, in one line."""


class ChatTemplate:
    """source: the template, or several by name (`default`; `tool_use`, taken where tools are given).
    special: the tokenizer's special tokens by name (bos_token, eos_token, ...), which templates print.
    Raises TemplateBroken.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special: Mapping[str, str] | None = None,
        *,
        model: str = "the model",
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
        budget: Callable[[], Budget] = Budget,
    ) -> None:
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special = dict(special or {})
        self._model = model
        self._budget = budget
        environment = Environment(now)
        self._templates: dict[str, jinja2.Template] = {}
        found: set[str] = set()
        for name, text in self.sources.items():
            self._templates[name] = _compiled(environment, name, text)
            found |= variables(environment, text)
        if not self._templates:
            raise TemplateBroken("there is no chat template")
        self.variables = frozenset(found)  # what it reads beside its own names

    @property
    def text(self) -> str:
        """Of all of them, for those who look for marks in it."""
        return "\n".join(self.sources.values())

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        values: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
    ) -> str:
        """The prompt. All data are plain JSON values. values: further variables (chat_template_kwargs).

        continue_final: the last message is begun and to be gone on with; no generation prompt then.
        Raises BadRequest where the template itself refuses these messages, TemplateFailed where it breaks, costs too
        much, or refuses while tools are given (an answer without them would be another question's).
        """
        template = self._chosen(tools)
        chat = [_named({key: value for key, value in m.items() if value is not None}) for m in messages]
        if continue_final:
            add_generation_prompt = False
            final = _marked(chat)
        given = {
            **self._special,
            **{key: value for key, value in (values or {}).items() if key not in _OWN},
            "messages": chat,
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            prompt = _rendered(template, given, self._budget())
        except Raised as err:
            raise template_refusals.refusal(self._model, str(err), with_tools=bool(tools)) from err
        except (TooExpensive, RecursionError, MemoryError) as err:
            why = "it calls itself too deeply" if isinstance(err, RecursionError) else str(err) or "no memory is left"
            raise self._failed(f"was ended: {why}") from err
        except Exception as err:  # foreign code may raise anything
            raise self._failed(f"fails on these messages: {_in_a_line(err)}") from err
        return _cut_at_mark(prompt, final) if continue_final else prompt

    def _chosen(self, tools: Any) -> jinja2.Template:
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise self._failed(f"has no default among its templates ({', '.join(sorted(self._templates))})")
        return self._templates[name]

    def _failed(self, what: str) -> HelexaError:
        return TemplateFailed(f"{self._model}: its chat template {what}", param="messages")


def _compiled(environment: Environment, name: str, text: str) -> jinja2.Template:
    if len(text) > SOURCE:
        raise TemplateBroken(f"the chat template {name!r} has {len(text)} characters, more than {SOURCE}")
    try:
        return environment.from_string(text)
    except Exception as err:  # a syntax error of Jinja, or of the code that was made of it
        raise TemplateBroken(f"the chat template {name!r} cannot be read: {_in_a_line(err)}") from err


def _rendered(template: jinja2.Template, given: dict[str, Any], budget: Budget) -> str:
    pieces: list[str] = []
    size = 0
    with spending(budget):
        for piece in template.generate(given):
            size += len(piece)
            if size > RENDERED:
                raise TooExpensive(f"its prompt has more than {RENDERED >> 20} Mi characters")
            pieces.append(piece)
    return "".join(pieces)


def _named(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under the names that templates read it by."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _marked(chat: list[dict[str, Any]]) -> str:
    """Put the mark at the end of the last message's text, and give that text."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _TAG
        return content
    parts = [dict(part) for part in content] if isinstance(content, list) else []
    for part in reversed(parts):
        if isinstance(text := part.get("text"), str):
            part["text"] = text + _TAG
            chat[-1]["content"] = parts
            return text
    raise BadRequest("the last message has no text to go on with", param="messages")


def _cut_at_mark(prompt: str, final: str) -> str:
    at = prompt.rfind(_TAG.strip())
    if at < 0 or final.strip() not in prompt:
        raise BadRequest("the model's chat template does not show the last message as it stands", param="messages")
    # A template that trims its messages trimmed the mark's blank too.
    return prompt[:at] if prompt.startswith(_TAG, at) else prompt[:at].rstrip()


def _in_a_line(err: BaseException) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) <= 300 else text[:297] + "..."
