"""Tool calls that the model wrote as plain JSON, told as `tool_calls`. Pure.

Where a call is forced, a JSON schema makes the model write `{"name": ..., "arguments": {...}}` and nothing else; beside
a response format it may; where the chat template cannot show tools, tools_as_text describes them and the model may
write the same. Arguments stream as they come: they are JSON text on the wire as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

_SPACE: Final = re.compile(r"\s+")
_ARGUMENTS: Final = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')

Chunk = dict[str, Any]


class WrittenCalls:
    """names: the functions that may be called. must: the answer is a call, by grammar; otherwise it may be text."""

    def __init__(self, names: Sequence[str], *, must: bool) -> None:
        self._starts = tuple('{"name":' + msgspec.json.encode(n).decode() + ',"arguments":{' for n in names)
        self._must = must
        self._choices: dict[int, _Written] = {}

    def chunk(self, chunk: Chunk) -> Sequence[Chunk]:
        out: list[Chunk] = []
        for choice in chunk.get("choices") or ():
            index = choice.get("index", 0)
            if index not in self._choices:
                self._choices[index] = _Written(self._starts, must=self._must, call_id=_call_id(chunk, index))
            written = self._choices[index]
            delta = choice.get("delta")
            if delta and (text := delta.get("content")):
                del delta["content"]
                delta.update(written.read(text))
                if not delta and "logprobs" not in choice and choice.get("finish_reason") is None:
                    return out  # one chunk bears one choice
            if choice.get("finish_reason") is not None:
                if rest := written.rest():
                    out.append({**chunk, "choices": [{"index": index, "delta": rest, "finish_reason": None}]})
                if written.called and choice["finish_reason"] == "stop":
                    choice["finish_reason"] = "tool_calls"
        out.append(chunk)
        return out

    def end(self) -> Sequence[Chunk]:
        return []


class _Written:
    """What one choice has written: undecided, then a call's arguments, or text."""

    def __init__(self, starts: Sequence[str], *, must: bool, call_id: str) -> None:
        self._starts = starts
        self._must = must
        self._call_id = call_id
        self._held: str | None = ""  # while it may still become a call
        self._depth = 0  # of the arguments' brackets; 0 outside them
        self._in_string = False
        self._escaped = False
        self.called = False

    def read(self, text: str) -> dict[str, Any]:
        """The delta to send for this content; {} for none."""
        if self.called:
            return self._call({"arguments": self._arguments(text)}) if self._depth else {}
        if self._held is None:
            return {"content": text}
        self._held += text
        dense = _SPACE.sub("", self._held)
        if any(dense.startswith(start) for start in self._starts):
            match = _ARGUMENTS.match(self._held)
            assert match is not None  # the same text, its white space aside
            self.called = True
            arguments = self._arguments(self._held[match.end() :])
            head = {"id": self._call_id, "type": "function"}
            return self._call({"name": match.group(1), "arguments": arguments}, **head)
        if self._must or any(start.startswith(dense) for start in self._starts):
            return {}
        return self.rest()

    def rest(self) -> dict[str, Any]:
        """Nothing more will make a call of what is held back."""
        held, self._held = self._held, None
        return {"content": held} if held and not self.called and not self._must else {}

    def _call(self, function: dict[str, str], **head: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": 0, **head, "function": function}]}

    def _arguments(self, text: str) -> str:
        """As much of `text` as belongs to the arguments' object."""
        for i, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return text[: i + 1]
        return text


def call_schema(
    functions: Sequence[tuple[str, dict[str, Any] | None]], answer: dict[str, Any] | bool | None = None
) -> dict[str, Any]:
    """The JSON schema of a call of one of these functions (name, parameters), or of an `answer` instead.

    Parameters and answer stand under `$defs`, their own references moved with them: they are written as from the root
    of a schema.
    """
    either: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/f{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, (name, _) in enumerate(functions)
    ]
    defs = {f"f{i}": _moved(_object(parameters), f"#/$defs/f{i}") for i, (_, parameters) in enumerate(functions)}
    if answer is not None:
        either.append({"$ref": "#/$defs/answer"})
        defs["answer"] = _moved(answer, "#/$defs/answer")
    return {"$defs": defs, **(either[0] if len(either) == 1 else {"anyOf": either})}


def _object(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """A function without parameters is called with {}."""
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return parameters if "type" in parameters else {"type": "object", **parameters}


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if isinstance(schema, dict):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, root)
            for key, value in schema.items()
        }
    return schema


def _call_id(chunk: Chunk, index: int) -> str:
    """Unique as the answer's own id is, and the same however the bytes were cut."""
    return f"call_{str(chunk.get('id', '')).removeprefix('chatcmpl-')[:22]}{index:02d}"
