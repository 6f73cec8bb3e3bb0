"""OpenAI's items as the neuron's `messages`. Pure.

What the model did stands in several items: reasoning, a text, calls. One after the other in this order, they become one
assistant message, as the model's own turn was one; a text or reasoning after that begins the next. Messages of the
client stay as many as they are.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from helexa.core.dialects import responses_wire as wire
from helexa.core.dialects.responses_tools import INPUT, bad, function_name
from helexa.core.errors import BadRequest

# An encrypted_content of ours is an opaque token with a version; one that does not begin so is another vendor's.
TOKEN: Final = "hx1."
# What our own ids of reasoning items begin with.
REASONING_ID: Final = "rs_hx"

Part = dict[str, Any]
_encode = msgspec.json.Encoder().encode
# Templates know system; developer is OpenAI's newer word for the same.
_ROLES: Final = {"user": "user", "system": "system", "developer": "system", "assistant": "assistant"}


def seal(text: str) -> str:
    """Reasoning as the token that a client keeps for us where nothing is stored."""
    return TOKEN + base64.urlsafe_b64encode(text.encode()).decode()


def try_unseal(token: str) -> str | None:
    """None for what is no token of ours."""
    if not token.startswith(TOKEN):
        return None
    try:
        return base64.b64decode(token[len(TOKEN) :], b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None


def is_reference(item: wire.Item) -> bool:
    """An item that stands for one that is stored; it may lack its type."""
    return item.type == "item_reference" or (item.type is None and item.role is None)


class MessagesBuilder:
    """drop: is told the name of what is left out.
    places: where in the request each message comes from."""

    def __init__(self, drop: Callable[[str], None]) -> None:
        self._drop = drop
        self._made: list[dict[str, Any]] = []
        self._turn: _Turn | None = None  # the assistant's that is still growing
        self._place = ""
        self.places: list[str] = []

    def finish(self) -> list[dict[str, Any]]:
        self._close()
        return self._made

    def _add(self, message: dict[str, Any], place: str) -> None:
        self._made.append(message)
        self.places.append(place)

    def _close(self) -> None:
        if self._turn is not None:
            self._add(self._turn.message(), self._place)
            self._turn = None

    def instructions(self, text: str) -> None:
        if text:
            self._add({"role": "system", "content": text}, "instructions")

    def text(self, text: str) -> None:
        """The input where it is no list."""
        self._close()
        self._add({"role": "user", "content": text}, "input")

    def items(self, items: Sequence[wire.Item], where: str = "input") -> None:
        for i, item in enumerate(items):
            self._item(item, f"{where}[{i}]")

    def _item(self, item: wire.Item, where: str) -> None:
        kind = item.type or ("message" if item.role is not None else "item_reference")
        if kind == "message":
            self._message(item, where)
        elif kind in ("function_call", "custom_tool_call"):
            self._call(item, where)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            if not item.call_id:
                raise bad(f"{where}.call_id", "is required")
            self._close()
            content = self._output(item, where)
            self._add({"role": "tool", "tool_call_id": item.call_id, "content": content}, where)
        elif kind == "reasoning":
            self._reasoning(item, where)
        elif kind in wire.DROPPED_ITEMS:
            self._drop(kind)
        elif kind == "additional_tools":
            pass  # read with the tools
        elif kind == "item_reference":
            raise bad(f"{where}.id", f"{item.id!r} refers to nothing that is stored here" if item.id else "is required")
        else:
            raise bad(f"{where}.type", f"{kind!r} is not supported here")

    # the assistant's turn

    def _grow(self, where: str, *, fits: Callable[[_Turn], bool]) -> _Turn:
        if self._turn is None or not fits(self._turn):
            self._close()
            self._turn, self._place = _Turn(), where
        return self._turn

    def _reasoning(self, item: wire.Item, where: str) -> None:
        """1. A token of ours holds it. 2. Without a token: what was thought is in `content`; a summary is all of it
        only in an item of ours. 3. All else is another model's, which this one never thought."""
        text: str | None = None
        if item.encrypted_content:
            text = try_unseal(item.encrypted_content)
        elif isinstance(item.content, list) and item.content:
            text = "".join(part.text or "" for part in item.content)
        elif item.summary and item.id is not None and item.id.startswith(REASONING_ID):
            text = "".join(part.text or "" for part in item.summary)
        elif not item.summary:
            return  # nothing was said
        if text is None:
            self._drop("reasoning")
        elif text:
            self._grow(where, fits=_Turn.takes_reasoning).reasoning.append(text)

    def _call(self, item: wire.Item, where: str) -> None:
        if not item.call_id:
            raise bad(f"{where}.call_id", "is required")
        if not item.name:
            raise bad(f"{where}.name", "is required")
        if item.type == "custom_tool_call":
            if item.input is None:
                raise bad(f"{where}.input", "is required")
            arguments = _encode({INPUT: item.input}).decode()
        else:
            if not isinstance(item.arguments, str):
                raise bad(f"{where}.arguments", "must be JSON in a text")
            arguments = item.arguments or "{}"
        function = {"name": function_name(item.name, item.namespace), "arguments": arguments}
        turn = self._grow(where, fits=_Turn.takes_calls)
        turn.calls.append({"id": item.call_id, "type": "function", "function": function})

    # messages

    def _message(self, item: wire.Item, where: str) -> None:
        role = _ROLES.get(item.role or "")
        if role is None:
            what = f"{item.role!r} is not known; use user, assistant, system or developer"
            raise bad(f"{where}.role", what if item.role else "is required")
        if item.content is None:
            raise bad(f"{where}.content", "is required")
        if role == "assistant":
            text = item.content if isinstance(item.content, str) else self._said(item.content, f"{where}.content")
            self._grow(where, fits=_Turn.takes_text).text = text
            return
        self._close()
        said = item.content
        content = said if isinstance(said, str) else _content(self._parts(said, f"{where}.content"))
        self._add({"role": role, "content": content}, where)

    def _said(self, parts: Sequence[wire.Part], where: str) -> str:
        texts = []
        for j, part in enumerate(parts):
            text = part.refusal if part.type == "refusal" else part.text
            if part.type not in ("output_text", "input_text", "text", "refusal"):
                raise bad(f"{where}[{j}].type", f"{part.type!r} cannot stand here; use output_text or refusal")
            if text is None:
                raise bad(f"{where}[{j}].{'refusal' if part.type == 'refusal' else 'text'}", "is required")
            texts.append(text)
        return "".join(texts)

    def _output(self, item: wire.Item, where: str) -> str | list[Part]:
        output = item.output
        if isinstance(output, str):
            return output
        if not isinstance(output, list):
            raise bad(f"{where}.output", "must be a text or a list of parts" if output is not None else "is required")
        return _content(self._parts(output, f"{where}.output"))

    def _parts(self, parts: Sequence[wire.Part], where: str) -> list[Part]:
        return [self._part(part, f"{where}[{j}]") for j, part in enumerate(parts)]

    def _part(self, part: wire.Part, where: str) -> Part:
        if part.type in ("input_text", "output_text", "text"):
            if part.text is None:
                raise bad(f"{where}.text", "is required")
            return {"type": "text", "text": part.text}
        if part.type == "input_image":
            return self._image(part, where)
        if part.type == "input_file":
            return _file(part, where)
        if not part.type:
            raise bad(f"{where}.type", "is required")
        raise bad(f"{where}.type", f"{part.type!r} is not supported here; use input_text, input_image or input_file")

    def _image(self, part: wire.Part, where: str) -> Part:
        url = part.image_url
        if not isinstance(url, str):
            what = "must be a text" if url is not None else "is required: a data: URL; files are not kept here"
            raise bad(f"{where}.image_url", what)
        if not url.lower().startswith(("data:", "http://", "https://")):  # what is fetched is a node's to say
            raise bad(f"{where}.image_url", "must be a data: URL, or an http(s) one where nodes may fetch images")
        if part.detail not in (None, "auto"):
            self._drop("detail")  # what an engine does to an image is its own
        return {"type": "image_url", "image_url": {"url": url}}


class _Turn:
    """An assistant's turn while it is read."""

    __slots__ = ("calls", "reasoning", "text")

    def __init__(self) -> None:
        self.text: str | None = None
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []

    def takes_reasoning(self) -> bool:
        return self.text is None and not self.calls

    def takes_text(self) -> bool:
        return self.text is None and not self.calls

    def takes_calls(self) -> bool:
        return True

    def message(self) -> dict[str, Any]:
        # null beside calls, as OpenAI's own clients send it: templates tell it from a text that is empty
        made: dict[str, Any] = {"role": "assistant", "content": self.text or (None if self.calls else "")}
        if self.reasoning:
            made["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            made["tool_calls"] = self.calls
        return made


def _content(parts: list[Part]) -> str | list[Part]:
    """One text as a string, which every template takes; several as they are: how to join them is the template's."""
    if not parts:
        return ""
    if len(parts) == 1 and parts[0]["type"] == "text":
        text: str = parts[0]["text"]
        return text
    return parts


def _file(part: wire.Part, where: str) -> Part:
    """Text in base64 or in a data: URL, under its name."""
    if part.file_data is None:
        raise bad(f"{where}.file_data", "is required: files are neither kept nor fetched here")
    kind, comma, data = part.file_data.partition(",")
    try:
        text = base64.b64decode(data if comma else kind, validate=True).decode()
    except (binascii.Error, ValueError):
        raise _no_text(where) from None
    if "\0" in text or text.startswith("%PDF-"):
        raise _no_text(where)
    return {"type": "text", "text": f"{part.filename}\n{text}" if part.filename else text}


def _no_text(where: str) -> BadRequest:
    return bad(f"{where}.file_data", "is no text in base64; other files are not read here, send what they say")
