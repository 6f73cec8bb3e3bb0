"""Anthropic's conversation as the neuron's `messages`. Pure.

A user turn may hold results of calls and text: each result becomes a message of role `tool`, what stands between and
after them user messages, in the order in which they came. An assistant turn becomes one message: its text, its calls,
and its own thinking as `reasoning_content`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from helexa.core.dialects import anthropic_wire as wire
from helexa.core.errors import BadRequest

# A signature of ours is an opaque token with a version; one that does not begin so is another vendor's.
SIGNATURE: Final = "hx1."

# Claude Code's first system block; it counts up, so that no prompt would ever be found in the cache again.
_CHANGES_WITH_EVERY_REQUEST: Final = "x-anthropic-billing-header:"
_SAYS_IT_IS_AN_ERROR: Final = re.compile(r"\W*(?:tool_use_)?error\b", re.IGNORECASE)

Part = dict[str, Any]


def bad(where: str, what: str) -> BadRequest:
    """In Anthropic's own form: "messages.0.content: Field required"."""
    return BadRequest(f"{where}: {what}", param=where)


class MessagesBuilder:
    """drop: is told the name of what is left out.
    thinking_turns: how many of the latest turns keep their thinking; None: all."""

    def __init__(
        self, drop: Callable[[str], None], *, keep_changing_blocks: bool = False, thinking_turns: int | None = None
    ) -> None:
        self._drop = drop
        self._keep_changing_blocks = keep_changing_blocks
        self._thinking_turns = thinking_turns
        self._made: list[dict[str, Any]] = []
        self._user: list[Part] | None = None  # the user message that is still growing
        self._assistant: _Turn | None = None

    def finish(self) -> list[dict[str, Any]]:
        self._close()
        return self._made

    def system(self, system: str | list[wire.Block] | None) -> None:
        if system is None:
            return
        if isinstance(system, str):
            if system:
                self._made.append({"role": "system", "content": system})
            return
        parts = []
        for i, block in enumerate(system):
            part = self._text(block, f"system.{i}")
            if part["text"].startswith(_CHANGES_WITH_EVERY_REQUEST) and not self._keep_changing_blocks:
                self._drop("x-anthropic-billing-header")
            else:
                parts.append(part)
        if parts:
            self._made.append({"role": "system", "content": _content(parts)})

    def messages(self, messages: Sequence[wire.Message]) -> None:
        keep_from = _first_turn_with_thinking(messages, self._thinking_turns)
        for i, message in enumerate(messages):
            where = f"messages.{i}"
            content = message.content
            if message.role not in ("user", "assistant", "system"):
                what = f"{message.role!r} is not known; use user, assistant or system" if message.role else ""
                raise bad(f"{where}.role", what or "Field required")
            if not isinstance(content, str | list):
                raise bad(f"{where}.content", "Field required")
            if message.role == "user":
                self._user_turn(content, where)
            elif message.role == "assistant":
                self._assistant_turn(content, where, with_thinking=i >= keep_from)
            else:
                self._close()
                self._made.append({"role": "system", "content": self._system_content(content, where)})

    # turns

    def _close(self) -> None:
        """What was growing is a message."""
        if self._user is not None:
            self._made.append({"role": "user", "content": _content(self._user)})
            self._user = None
        if self._assistant is not None:
            self._made.append(self._assistant.message())
            self._assistant = None

    def _user_turn(self, content: str | list[wire.Block], where: str) -> None:
        if isinstance(content, str):
            self._user_parts().append({"type": "text", "text": content})
            return
        if not content:
            self._user_parts()
        for j, block in enumerate(content):
            place = f"{where}.content.{j}"
            if block.type == "tool_result":
                self._close()
                self._made.append(self._result(block, place))
            elif block.type == "text":
                self._user_parts().append(self._text(block, place))
            else:
                self._user_parts().extend(self._parts(block, place))

    def _user_parts(self) -> list[Part]:
        if self._user is None:
            self._close()
            self._user = []
        return self._user

    def _assistant_turn(self, content: str | list[wire.Block], where: str, *, with_thinking: bool) -> None:
        if self._assistant is None:
            self._close()
            self._assistant = _Turn()
        turn = self._assistant
        if isinstance(content, str):
            turn.text.append(content)
            return
        for j, block in enumerate(content):
            place = f"{where}.content.{j}"
            if block.type == "text":
                turn.text.append(self._text(block, place)["text"])
            elif block.type == "tool_use":
                turn.calls.append(_call(block, place))
            elif block.type == "thinking":
                self._thought(turn, block, place, keep=with_thinking)
            elif block.type in wire.DROPPED_BLOCKS:
                self._drop(block.type)
            else:
                raise self._unknown(block, place)

    def _thought(self, turn: _Turn, block: wire.Block, where: str, *, keep: bool) -> None:
        if block.thinking is None:
            raise bad(f"{where}.thinking", "Field required")
        if block.signature and not block.signature.startswith(SIGNATURE):
            self._drop("thinking")  # another model's, which this one never thought
        elif keep:
            turn.thinking.append(block.thinking)

    def _result(self, block: wire.Block, where: str) -> dict[str, Any]:
        if not block.tool_use_id:
            raise bad(f"{where}.tool_use_id", "Field required")
        content = block.content
        if isinstance(content, dict):
            raise bad(f"{where}.content", "must be a text or a list of blocks")
        parts: list[Part] = []
        if isinstance(content, str):
            parts.append({"type": "text", "text": content})
        elif content is not None:
            for j, inner in enumerate(content):
                parts.extend(self._parts(inner, f"{where}.content.{j}"))
        if block.is_error:
            _say_error(parts)
        return {"role": "tool", "tool_call_id": block.tool_use_id, "content": _content(parts)}

    # blocks

    def _system_content(self, content: str | list[wire.Block], where: str) -> str | list[Part]:
        if isinstance(content, str):
            return content
        return _content([self._text(block, f"{where}.content.{j}") for j, block in enumerate(content)])

    def _text(self, block: wire.Block, where: str) -> Part:
        if block.type != "text":
            raise bad(
                f"{where}.type", f"{block.type!r} cannot stand here; use text" if block.type else "Field required"
            )
        if block.text is None:
            raise bad(f"{where}.text", "Field required")
        return {"type": "text", "text": block.text}

    def _parts(self, block: wire.Block, where: str) -> list[Part]:
        """A block of a user's turn, or of a result, as content parts."""
        if block.type == "text":
            return [self._text(block, where)]
        if block.type == "image":
            if block.transformations:
                self._drop("transformations")  # what an engine does to a large image is its own
            return [_image(block, where)]
        if block.type == "document":
            return self._document(block, where)
        if block.type == "search_result":
            return [self._search_result(block, where)]
        if block.type in wire.DROPPED_BLOCKS:
            self._drop(block.type)
            return []
        raise self._unknown(block, where)

    def _unknown(self, block: wire.Block, where: str) -> BadRequest:
        if not block.type:
            return bad(f"{where}.type", "Field required")
        if block.type in wire.BLOCKS:
            return bad(f"{where}.type", f"{block.type!r} cannot stand here")
        return bad(f"{where}.type", f"{block.type!r} is not supported here")

    def _document(self, block: wire.Block, where: str) -> list[Part]:
        source = block.source
        if not isinstance(source, wire.Source):
            raise bad(f"{where}.source", "Field required")
        self._no_citations(block)
        head = [text for text in (block.title, block.context) if text]
        parts: list[Part] = [{"type": "text", "text": "\n".join(head)}] if head else []
        if source.type == "text":
            if source.data is None:
                raise bad(f"{where}.source.data", "Field required")
            return [*parts, {"type": "text", "text": source.data}]
        if source.type == "content":
            if isinstance(source.content, str):
                return [*parts, {"type": "text", "text": source.content}]
            for j, inner in enumerate(source.content or ()):
                parts.extend(self._parts(inner, f"{where}.source.content.{j}"))
            return parts
        what = "PDF documents are" if source.type in ("base64", "url") else f"a source of type {source.type!r} is"
        raise bad(f"{where}.source.type", f"{what} not read here; send the document's text")

    def _no_citations(self, block: wire.Block) -> None:
        if isinstance(block.citations, dict) and block.citations.get("enabled"):
            self._drop("citations")

    def _search_result(self, block: wire.Block, where: str) -> Part:
        if not isinstance(block.content, list):
            raise bad(f"{where}.content", "must be a list of text blocks")
        self._no_citations(block)
        texts = [self._text(inner, f"{where}.content.{j}")["text"] for j, inner in enumerate(block.content)]
        source = block.source if isinstance(block.source, str) else None
        return {"type": "text", "text": "\n".join(text for text in (block.title, source, *texts) if text)}


class _Turn:
    """An assistant's turn while it is read."""

    __slots__ = ("calls", "text", "thinking")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.thinking: list[str] = []
        self.calls: list[dict[str, Any]] = []

    def message(self) -> dict[str, Any]:
        text = "".join(self.text)
        # null beside calls, as OpenAI's own clients send it: templates tell it from a text that is empty
        made: dict[str, Any] = {"role": "assistant", "content": text if text or not self.calls else None}
        if self.thinking:
            made["reasoning_content"] = "".join(self.thinking)
        if self.calls:
            made["tool_calls"] = self.calls
        return made


def _call(block: wire.Block, where: str) -> dict[str, Any]:
    if not block.id:
        raise bad(f"{where}.id", "Field required")
    if not block.name:
        raise bad(f"{where}.name", "Field required")
    arguments = bytes(block.input).decode() or "{}"
    if not arguments.startswith("{"):
        raise bad(f"{where}.input", "must be an object")
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _image(block: wire.Block, where: str) -> Part:
    source = block.source
    if not isinstance(source, wire.Source):
        raise bad(f"{where}.source", "Field required")
    if source.type == "base64":
        if not source.media_type:
            raise bad(f"{where}.source.media_type", "Field required")
        if source.data is None:
            raise bad(f"{where}.source.data", "Field required")
        url = f"data:{source.media_type};base64,{source.data}"
    elif source.type == "url":
        url = source.url or ""
        if not url.lower().startswith(("data:", "http://", "https://")):  # what is fetched is a node's to say
            raise bad(f"{where}.source.url", "must be a data:, http: or https: URL; or send the image as base64")
    else:
        raise bad(f"{where}.source.type", f"{source.type!r} is not supported here; send images as base64")
    return {"type": "image_url", "image_url": {"url": url}}


def _say_error(parts: list[Part]) -> None:
    """The chat dialect marks no result as failed: its text has to say so, unless it does."""
    if parts and parts[0]["type"] == "text":
        if not _SAYS_IT_IS_AN_ERROR.match(parts[0]["text"]):
            parts[0]["text"] = f"Error: {parts[0]['text']}"
    else:
        parts.insert(0, {"type": "text", "text": "Error"})


def _content(parts: list[Part]) -> str | list[Part]:
    """One text as a string, which every template takes; several as they are: how to join them is the template's."""
    if not parts:
        return ""
    if len(parts) == 1 and parts[0]["type"] == "text":
        text: str = parts[0]["text"]
        return text
    return parts


def _first_turn_with_thinking(messages: Sequence[wire.Message], turns: int | None) -> int:
    """Index of the message from which on thinking is kept. A turn begins where the user speaks without
    bringing results of calls."""
    if turns is None:
        return 0
    for i in range(len(messages) - 1, -1, -1):
        content = messages[i].content
        is_said = isinstance(content, str) or (
            isinstance(content, list) and all(block.type != "tool_result" for block in content)
        )
        if messages[i].role == "user" and is_said and i < len(messages) - 1:
            turns -= 1
            if turns == 0:
                return i
    return 0
