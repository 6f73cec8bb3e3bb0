"""Answers as models of each family write them, and how they are read in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

from helexa.neuron.harness.answers import families
from helexa.neuron.harness.answers.families import FAMILIES, GENERIC, HARMONY, Family
from helexa.neuron.harness.answers.pieces import Content, Piece, Reasoning, Tools, Whole, collect

TOOLS: Final[dict[str, dict[str, Any] | None]] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "places": {"type": "array"}},
    },
    "get_time": None,
    "a.b-c/d": {"type": "object", "properties": {"text": {"type": ["string", "null"]}, "flag": {"type": "boolean"}}},
}
ALL: Final[dict[str, Family]] = {family.name: family for _, family in FAMILIES} | {GENERIC.name: GENERIC}
Written = tuple[str, dict[str, Any]]


def _dense(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _json(call: Written, key: str = "arguments") -> str:
    return _dense({"name": call[0], key: call[1]})


def _xml(call: Written) -> str:
    def value(given: Any) -> str:
        return given if isinstance(given, str) else _dense(given)

    parameters = "".join(f"<parameter={k}>\n{value(v)}\n</parameter>\n" for k, v in call[1].items())
    return f"<tool_call>\n<function={call[0]}>\n{parameters}</function>\n</tool_call>"


def _deepseek(calls: Sequence[Written]) -> str:
    inner = "\n".join(
        f"{families.CALL_BEGIN}function{families.SEPARATOR}{name}\n```json\n{_dense(arguments)}\n```{families.CALL_END}"
        for name, arguments in calls
    )
    return families.CALLS_BEGIN + inner + families.CALLS_END


def _deepseek_short(calls: Sequence[Written]) -> str:
    inner = "".join(
        f"{families.CALL_BEGIN}{name}{families.SEPARATOR}{_dense(arguments)}{families.CALL_END}"
        for name, arguments in calls
    )
    return families.CALLS_BEGIN + inner + families.CALLS_END


WRITE: Final[dict[str, tuple[str, Callable[[Sequence[Written]], str]]]] = {  # form -> family, how it writes calls
    "hermes": ("hermes", lambda calls: "\n".join(f"<tool_call>\n{_json(c)}\n</tool_call>" for c in calls)),
    "hermes-open": ("hermes", lambda calls: "\n".join(f"<tool_call>{_json(c)}" for c in calls)),
    "qwen-xml": ("qwen-xml", lambda calls: "\n".join(map(_xml, calls))),
    "qwen-xml-bare": ("qwen-xml", lambda calls: "\n".join(_xml(c).removeprefix("<tool_call>\n") for c in calls)),
    "llama": ("llama", lambda calls: "; ".join(_json(c, "parameters") for c in calls)),
    "llama-tag": ("llama", lambda calls: "<|python_tag|>" + "; ".join(_json(c, "parameters") for c in calls)),
    "mistral": ("mistral", lambda calls: "[TOOL_CALLS] [" + ", ".join(map(_json, calls)) + "]"),
    "mistral-args": ("mistral-args", lambda calls: "".join(f"[TOOL_CALLS]{n}[ARGS]{_dense(a)}" for n, a in calls)),
    "mistral-id": (
        "mistral-args",
        lambda calls: "".join(f"[TOOL_CALLS]{n}[CALL_ID]abcdefgh1[ARGS]{_dense(a)}" for n, a in calls),
    ),
    "deepseek": ("deepseek", _deepseek),
    "deepseek-short": ("deepseek-short", _deepseek_short),
    "gemma": ("gemma", lambda calls: "\n".join(f"```tool_call\n{_json(c)}\n```" for c in calls)),
    "gemma-json": ("gemma", lambda calls: "\n".join(f"```json\n[{_json(c)}]\n```" for c in calls)),
    "generic": ("generic", lambda calls: "\n".join(map(_json, calls))),
    "harmony": (
        "harmony",
        lambda calls: "<|start|>assistant".join(
            f"<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{_dense(a)}<|call|>" for n, a in calls
        ),
    ),
    "harmony-role": (
        "harmony",
        lambda calls: "<|start|>assistant".join(
            f" to=functions.{n}<|channel|>commentary json<|message|>{_dense(a)}<|call|>" for n, a in calls
        ),
    ),
}


def answer(form: str, thoughts: str, text: str, calls: Sequence[Written]) -> str:
    family, write = WRITE[form]
    if family == HARMONY.name:
        parts = [f"<|channel|>analysis<|message|>{thoughts}<|end|>"] if thoughts else []
        if text:
            parts.append(f"<|channel|>{'commentary' if calls else 'final'}<|message|>{text}<|end|>")
        return "<|start|>assistant".join([*parts, *([write(calls)] if calls else [])])
    opening, closing = ALL[family].form.think or ("", "")
    thought = f"{opening}\n{thoughts}\n{closing}\n\n" if thoughts else ""
    return thought + text + ("\n" if text and calls else "") + (write(calls) if calls else "")


def read(family: Family, cuts: Sequence[str], tools: Tools = TOOLS, **options: Any) -> list[Piece]:
    """The pieces of an answer that came as these parts."""
    parser = family.parser(tools, call_id=lambda index: f"call_{index}", **options)
    pieces: list[Piece] = []
    for cut in cuts:
        pieces += parser.feed(cut)
    return joined([*pieces, *parser.end()])


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind as one."""
    out: list[Piece] = []
    for piece in pieces:
        last = out[-1] if out else None
        if isinstance(piece, (Content, Reasoning)) and type(last) is type(piece):
            out[-1] = type(piece)(last.text + piece.text)
        elif (
            type(last) is type(piece)
            and hasattr(piece, "text")
            and getattr(last, "index", 0) == getattr(piece, "index", 1)
        ):
            out[-1] = type(piece)(last.index, last.text + piece.text)  # type: ignore[union-attr,call-arg]
        else:
            out.append(piece)
    return out


def whole(family: Family, text: str, tools: Tools = TOOLS, **options: Any) -> Whole:
    return collect(read(family, [text], tools, **options))


def cut_at(text: str, places: Sequence[int]) -> list[str]:
    edges = [0, *sorted({p % (len(text) + 1) for p in places}), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]
