"""Which form a model's calls have, told by its chat template. Pure.

A template that shows calls to the model in a form is the best witness of the form that the model was trained to write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from helexa.neuron.harness.answers.blocks import Block, Event, Fenced, HeadedCall, JsonCalls, ToTheEnd, XmlCall
from helexa.neuron.harness.answers.harmony import HarmonyParser
from helexa.neuron.harness.answers.machine import Form, TextParser
from helexa.neuron.harness.answers.pieces import Parser, Tools, new_call_id

SEPARATOR: Final = "<｜tool▁sep｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def _hermes(mark: str, tools: Tools, stream: bool) -> Block:
    return JsonCalls(mark, tools, stream=stream, closing="</tool_call>")


def _xml(mark: str, tools: Tools, stream: bool) -> Block:
    return XmlCall(mark, tools, closing="</tool_call>")


def _xml_function(mark: str, tools: Tools, stream: bool) -> Block:
    return XmlCall(mark, tools, function="", closing="</tool_call>")


def _bare(mark: str, tools: Tools, stream: bool) -> Block:
    return JsonCalls(mark, tools, stream=stream, bare=True)


def _to_the_end(mark: str, tools: Tools, stream: bool) -> Block:
    return ToTheEnd(mark, tools, stream=stream)


def _fenced(mark: str, tools: Tools, stream: bool) -> Block:
    return Fenced(mark, tools, bare=mark == "```json")


def _mistral(mark: str, tools: Tools, stream: bool) -> Block:
    return _Mistral(mark, tools, stream=stream)


def _mistral_head(text: str) -> tuple[str, int] | None:
    """`name[ARGS]`, `name[CALL_ID]id[ARGS]`, or `name{`, which is not read over."""
    at = text.find("[ARGS]")
    brace = text.find("{")
    if at < 0 or 0 <= brace < at:
        return (text[:brace].strip(), brace) if brace >= 0 else None
    return text[:at].partition("[CALL_ID]")[0].strip(), at + len("[ARGS]")


class _Mistral:
    """An array of calls, or a name with arguments: the first character tells."""

    def __init__(self, mark: str, tools: Tools, *, stream: bool) -> None:
        self.rest: str | None = None
        self._array = JsonCalls(mark, tools, stream=stream)
        self._headed = HeadedCall(mark, tools, stream=stream, head=_mistral_head)
        self._chosen: Block | None = None
        self._text = ""

    def feed(self, text: str) -> list[Event]:
        self._text += text
        if self._chosen is None:
            if not (begins := self._text.lstrip()):
                return []
            self._chosen = self._array if begins[0] in "[{" else self._headed
            text = self._text
        events = self._chosen.feed(text)
        self.rest = self._chosen.rest
        return events

    def end(self) -> list[Event]:
        if self._chosen is None:
            self._array.feed(self._text)
            return self._array.end()
        return self._chosen.end()


def _deepseek(mark: str, tools: Tools, stream: bool) -> Block:
    closings = ("```", CALL_END)
    return HeadedCall(mark, tools, stream=stream, head=_deepseek_head, fence="```json", closings=closings)


def _deepseek_head(text: str) -> tuple[str, int] | None:
    """`function<sep>name` and a line break, or `name<sep>`."""
    kind, found, rest = text.partition(SEPARATOR)
    if not found:
        return None
    if kind.strip() != "function":
        return kind.strip(), len(kind) + len(SEPARATOR)
    name, line, _ = rest.partition("\n")
    return (name.strip(), len(kind) + len(SEPARATOR) + len(name) + 1) if line else None


@dataclass(frozen=True, slots=True)
class Family:
    """special: its marks are special tokens, which the text of an answer shows only when asked to."""

    name: str
    form: Form = field(default_factory=Form)
    special: bool = False

    def parser(
        self,
        tools: Tools,
        *,
        prompt: str = "",
        stream: bool = False,
        call_id: Callable[[int], str] = new_call_id,
    ) -> Parser:
        """prompt: what the model was given, for how its answer begins. stream: a grammar holds what it writes."""
        if self.name == "harmony":
            return HarmonyParser(tools, prompt=prompt, stream=stream, call_id=call_id)
        return TextParser(self.form, tools, thinking=self.opens_thoughts(prompt), stream=stream, call_id=call_id)

    def opens_thoughts(self, prompt: str) -> bool:
        """The prompt ends within thoughts."""
        if self.form.think is None or self.name == "harmony":
            return False
        opening, closing = self.form.think
        return prompt.rstrip().endswith(opening) and not prompt.endswith(closing)


_FENCES: Final = {"```tool_code": _fenced, "```tool_call": _fenced, "```json": _fenced}

_DEEPSEEK: Final = Form(openings={CALL_BEGIN: _deepseek}, silent=(CALLS_BEGIN, CALLS_END))

BARE: Final = Form(think=None, bare=_bare)
BARE_OR_FENCED: Final = Form(think=None, openings=_FENCES, bare=_bare)

HARMONY: Final = Family("harmony", Form(think=None), special=True)
GENERIC: Final = Family("generic", Form(openings=_FENCES, bare=_bare))
FAMILIES: Final[tuple[tuple[tuple[str, ...], Family], ...]] = (  # marks, all of which the template has; the first fits
    (("<|channel|>", "<|message|>"), HARMONY),
    (
        ("<function=", "<parameter="),
        Family("qwen-xml", Form(openings={"<tool_call>": _xml, "<function=": _xml_function}), special=True),
    ),
    (("<tool_call>",), Family("hermes", Form(openings={"<tool_call>": _hermes}), special=True)),
    (
        ("[TOOL_CALLS]", "[ARGS]"),
        Family("mistral-args", Form(("[THINK]", "[/THINK]"), {"[TOOL_CALLS]": _mistral}), special=True),
    ),
    (("[TOOL_CALLS]",), Family("mistral", Form(openings={"[TOOL_CALLS]": _mistral}), special=True)),
    ((CALLS_BEGIN, "```json"), Family("deepseek", _DEEPSEEK, special=True)),
    ((CALLS_BEGIN,), Family("deepseek-short", _DEEPSEEK, special=True)),
    (
        ("<|start_header_id|>", "parameters"),
        Family("llama", Form(openings={"<|python_tag|>": _to_the_end}, bare=_bare), special=True),
    ),
    (("<start_of_turn>",), Family("gemma", Form(openings=_FENCES, bare=_bare))),
)


def family_of(template: str) -> Family:
    """template: its whole text. GENERIC where it shows no form that is known."""
    return next((family for marks, family in FAMILIES if all(mark in template for mark in marks)), GENERIC)
