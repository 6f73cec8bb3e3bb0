"""Tool calls that the model wrote as plain JSON, told as `tool_calls`. Pure.

Where a call is forced, a JSON schema makes the model write `{"name": ..., "arguments": {...}}` and nothing else; beside
a response format it may; where the chat template cannot show tools, tools_as_text describes them and the model may
write the same, or put it into a fence. What it wrote is read by `answers`, as for every harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from helexa.neuron.harness.answers.families import BARE, BARE_OR_FENCED
from helexa.neuron.harness.answers.machine import TextParser
from helexa.neuron.harness.answers.pieces import CallArguments, CallStarted, Content, Piece

Chunk = dict[str, Any]


class WrittenCalls:
    """names: the functions that may be called. must: the answer is a call, by grammar, and its arguments are told as
    they come; otherwise it may be text."""

    def __init__(self, names: Sequence[str], *, must: bool) -> None:
        self._tools: Final = dict.fromkeys(names)
        self._must = must
        self._choices: dict[int, _Written] = {}

    def chunk(self, chunk: Chunk) -> Sequence[Chunk]:
        out: list[Chunk] = []
        for choice in chunk.get("choices") or ():
            index = choice.get("index", 0)
            if index not in self._choices:
                self._choices[index] = self._begun(_call_id(chunk, index))
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

    def _begun(self, call_id: str) -> _Written:
        form = BARE if self._must else BARE_OR_FENCED
        parser = TextParser(form, self._tools, stream=self._must, call_id=lambda n: f"{call_id}{n or ''}")
        return _Written(parser, must=self._must)


class _Written:
    """What one choice has written, as deltas; {} for none."""

    def __init__(self, parser: TextParser, *, must: bool) -> None:
        self._parser = parser
        self._must = must
        self.called = False

    def read(self, text: str) -> dict[str, Any]:
        return self._delta(self._parser.feed(text))

    def rest(self) -> dict[str, Any]:
        return self._delta(self._parser.end())

    def _delta(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = ""
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            match piece:
                case Content(text):
                    content += text
                case CallStarted(index, call_id, name):
                    self.called = True
                    function = {"name": name, "arguments": ""}
                    calls.append({"index": index, "id": call_id, "type": "function", "function": function})
                case CallArguments(index, text):
                    if not calls or calls[-1]["index"] != index:
                        calls.append({"index": index, "function": {"arguments": ""}})
                    calls[-1]["function"]["arguments"] += text
        told: dict[str, Any] = {"content": content} if content and not self._must else {}  # of a call cut off, say
        return told | ({"tool_calls": calls} if calls else {})


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
