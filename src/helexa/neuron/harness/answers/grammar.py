"""Grammars that hold an answer to calls, in llguidance's dialect of Lark: a call of the request's tools with arguments
by their schemas, in the form that the family's models write and its parser reads. Pure.

Forced: one call or several, nothing beside (thoughts where they cannot be switched off). Otherwise: text as the model
likes, and from a call's first mark on its grammar; that needs a mark that no text has, so families that write bare JSON
have none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from helexa.neuron.harness.answers import families
from helexa.neuron.harness.answers.families import Family

# Between the tokens of JSON, as the engine draws the line for other schemas.
_SPACE: Final = r"( |\n{1,2}[ \t]{0,20})?"
_TEXT: Final = r"/(.|\n)*/"
_OPTIONS: Final = ("x-guidance",)  # a schema's own words to llguidance are not the client's to say

Tool = tuple[str, Mapping[str, Any] | None]  # name, schema of the parameters
Marks = Mapping[str, int]  # the tokenizer's added tokens -> their ids


@dataclass(frozen=True, slots=True)
class _Written:
    """begin: before the first call; head, tail: around a call's arguments; between, end: two calls, and the last."""

    head: Callable[[str], str]
    tail: str = "}"
    begin: str = ""
    opens: str = ""  # behind `begin`, as terms of a grammar
    between: str | None = None  # None: a second call is not written
    end: str = ""
    trigger: str | None = None  # the mark that calls begin with


def _named(key: str, before: str = "") -> Callable[[str], str]:
    return lambda name: f'{before}{{"name": {json.dumps(name)}, "{key}": '


_WRITTEN: Final[dict[str, _Written]] = {
    "hermes": _Written(_named("arguments", "<tool_call>\n"), "}\n</tool_call>", between="\n", trigger="<tool_call>"),
    "llama": _Written(_named("parameters"), between="; "),
    "mistral": _Written(
        _named("arguments"),
        begin="[TOOL_CALLS]",
        opens='" "? "["',
        between=", ",
        end="]",
        trigger="[TOOL_CALLS]",
    ),
    "mistral-args": _Written(lambda name: f"[TOOL_CALLS]{name}[ARGS]", "", between="", trigger="[TOOL_CALLS]"),
    "deepseek": _Written(
        lambda name: f"{families.CALL_BEGIN}function{families.SEPARATOR}{name}\n```json\n",
        f"\n```{families.CALL_END}",
        begin=families.CALLS_BEGIN,
        between="\n",
        end=families.CALLS_END,
        trigger=families.CALLS_BEGIN,
    ),
    "deepseek-short": _Written(
        lambda name: f"{families.CALL_BEGIN}{name}{families.SEPARATOR}",
        families.CALL_END,
        begin=families.CALLS_BEGIN,
        between="",
        end=families.CALLS_END,
        trigger=families.CALLS_BEGIN,
    ),
    "qwen-xml": _Written(
        lambda name: f"<tool_call>\n<function={name}>\n",
        "</function>\n</tool_call>",
        between="\n",
        trigger="<tool_call>",
    ),
    "harmony": _Written(
        lambda name: f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
        "",
        trigger="<|channel|>",
    ),
}
_BARE: Final = _Written(_named("arguments"))


def call_grammar(
    family: Family,
    tools: Sequence[Tool],
    marks: Marks,
    *,
    forced: bool,
    parallel: bool = True,
    opened: bool = False,
    answer: Mapping[str, Any] | None = None,
    strict: bool = False,
) -> str | None:
    """parallel: several calls may be made. opened: the prompt ends within thoughts. answer: a schema of what the model
    may write in place of calls. strict: what begins like a call is one, where no mark tells.
    None: this family's text cannot be held only where it calls."""
    written = _WRITTEN.get(family.name, _BARE)
    marked = written.trigger in marks
    if not (forced or marked or (strict and written.trigger is None)):
        return None
    rules = _Rules(marks)
    calls = rules.calls(family, written, tools, parallel=parallel)
    if answer is not None:
        calls = rules.either(calls, answer, in_channel=family.name == "harmony")
    if family.name == "harmony":
        rules.harmony(calls, forced=forced)
    elif forced:
        rules.forced(family, calls, opened=opened)
    elif marked:
        rules.lazy(family, calls, opened=opened)
    else:
        rules.bare(family, calls, opened=opened)
    return rules.text()


class _Rules:
    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._lines: list[str] = []

    def text(self) -> str:
        return "\n".join(["%llguidance {}", *self._lines, f"TEXT: {_TEXT}", ""])

    def _add(self, name: str, body: str) -> str:
        self._lines.append(f"{name}: {body}")
        return name

    def _terms(self, text: str) -> str:
        """Text as terms; a mark that is a token of its own is that token, which text never is."""
        present = [mark for mark in self._marks if mark in text]
        if not present:
            return json.dumps(text, ensure_ascii=False) if text else ""
        pattern = "|".join(re.escape(mark) for mark in sorted(present, key=len, reverse=True))
        parts = re.split(f"({pattern})", text)
        terms = [
            f"<[{self._marks[part]}]>" if part in present else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        ]
        return " ".join(terms)

    def calls(self, family: Family, written: _Written, tools: Sequence[Tool], *, parallel: bool) -> str:
        one = []
        for i, (name, schema) in enumerate(tools):
            body = self._xml(i, schema) if family.name == "qwen-xml" else _json(_object(schema))
            terms = (self._terms(written.head(name)), body, self._terms(written.tail))
            one.append(self._add(f"call_{i}", " ".join(filter(None, terms))))
        call = self._add("call", " | ".join(one))
        many = f" ({self._terms(written.between)} {call})*" if parallel and written.between is not None else ""
        return self._add(
            "calls", f"{self._terms(written.begin)} {written.opens} {call}{many} {self._terms(written.end)}".strip()
        )

    def _thoughts(self, family: Family, *, opened: bool) -> str:
        """Thoughts that the prompt opened, or that the model may open, with the blank lines behind them."""
        assert family.form.think is not None
        opening, closing = family.form.think
        if closing in self._marks:
            body = f"TEXT {self._terms(closing)}"
        else:
            self._lines.append(f"thought[lazy]: TEXT {json.dumps(closing)}")
            body = "thought"
        self._lines.append(r"BLANK: /\n{0,4}/")
        return f"{body} BLANK" if opened else f"({self._terms(opening)} {body} BLANK)?"

    def forced(self, family: Family, calls: str, *, opened: bool) -> None:
        self._add("start", f"{self._thoughts(family, opened=True)} {calls}" if opened else calls)

    def lazy(self, family: Family, calls: str, *, opened: bool) -> None:
        assert family.form.think is not None
        self._add("start", f"{self._thoughts(family, opened=opened)} TEXT ({calls} BLANK)?")

    def bare(self, family: Family, calls: str, *, opened: bool) -> None:
        """A call is what begins with a bracket."""
        self._lines.append(r"WORDS: /([^{\s](.|\n)*)?/")
        thoughts = f"{self._thoughts(family, opened=opened)} " if opened or self._thinks_in_tokens(family) else ""
        self._add("start", f"{thoughts}({calls} | WORDS)")

    def _thinks_in_tokens(self, family: Family) -> bool:
        return family.form.think is not None and family.form.think[0] in self._marks

    def either(self, calls: str, answer: Mapping[str, Any], *, in_channel: bool) -> str:
        before = f'{self._terms("<|channel|>")} "final" {self._terms("<|message|>")} ' if in_channel else ""
        return self._add("either", f"{calls} | {before}{_json(answer)}")

    def harmony(self, calls: str, *, forced: bool) -> None:
        message = [self._terms(part) for part in ("<|channel|>", "<|message|>", "<|end|>", "<|start|>assistant")]
        channel, begin, end, start = message
        kinds = '"analysis"' if forced else '("analysis" | "commentary")'
        self._add("before", f"{channel} {kinds} {begin} TEXT {end} {start}")
        last = calls if forced else f'{calls} | {channel} "final" {begin} TEXT'
        self._add("start", f"before* ({last})")

    def _xml(self, i: int, schema: Mapping[str, Any] | None) -> str:
        """Each parameter in the order of the schema, those that are not required or not."""
        wanted = _object(schema)
        required = wanted.get("required") or ()
        terms = []
        for j, (key, value) in enumerate((wanted.get("properties") or {}).items()):
            name = f"parameter_{i}_{j}"
            end = "\n</parameter>\n"
            if isinstance(value, Mapping) and value.get("type") not in (None, "string") and "enum" not in value:
                body = f"{_json({**value, **_definitions(wanted)})} {self._terms(end)}"
            else:
                self._lines.append(f"value_{i}_{j}[lazy]: TEXT {json.dumps(end)}")
                body = f"value_{i}_{j}"
            self._add(name, f"{self._terms(f'<parameter={key}>')} {json.dumps(chr(10))} {body}")
            terms.append(name if key in required else f"{name}?")
        return " ".join(terms)


def _json(schema: Any) -> str:
    return "%json " + json.dumps({**_without_options(schema), "x-guidance": {"whitespace_pattern": _SPACE}})


def _object(schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """A function without parameters is called with {}."""
    if not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return dict(schema) if "type" in schema else {"type": "object", **schema}


def _definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _without_options(schema: Any) -> Any:
    return {key: value for key, value in schema.items() if key not in _OPTIONS}
