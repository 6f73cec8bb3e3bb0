"""A stream's events put together into the answer in one piece that the same request would have had. Pure."""

from __future__ import annotations

from typing import Any

_OBJECTS = {"chat.completion.chunk": "chat.completion"}
_LAST = ("usage", "timings")  # of the whole answer, at its end
_PER_EVENT = frozenset({"choices", "prompt_progress"})  # what has no meaning once the answer is whole


class Collector:
    """Of chat chunks and completion chunks alike: a choice with `delta` becomes one with `message`."""

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}
        self._rest: dict[str, Any] = {}

    def add(self, chunk: dict[str, Any]) -> None:
        """Once for each token."""
        for choice in chunk.get("choices") or ():
            index = choice.get("index", 0)
            if index not in self._choices:
                self._choices[index] = _Choice()
            self._choices[index].add(choice)
        if not self._rest:
            self._rest = {key: value for key, value in chunk.items() if key not in _PER_EVENT}
        for key in _LAST:
            if key in chunk:
                self._rest[key] = chunk[key]

    def answer(self) -> dict[str, Any]:
        kind = self._rest.get("object")
        choices = [self._choices[index].whole(index) for index in sorted(self._choices)]
        return {"choices": choices, **self._rest, "object": _OBJECTS.get(str(kind), kind)}


class _Choice:
    def __init__(self) -> None:
        self._is_chat = False
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._rest: dict[str, Any] = {"finish_reason": None, "stop_reason": None}
        self._logprobs: dict[str, list[Any] | None] | None = None

    def add(self, choice: dict[str, Any]) -> None:
        for key, value in choice.items():
            if key == "delta":
                self._is_chat = True
                self._add_delta(value)
            elif key == "text":
                self._text.append(value)
            elif key == "logprobs":
                self._add_logprobs(value)
            elif key == "finish_reason":
                self._rest[key] = value if value is not None else self._rest[key]
            elif key != "index":
                self._rest[key] = value

    def _add_delta(self, delta: dict[str, Any]) -> None:
        if text := delta.get("content"):
            self._text.append(text)
        if thought := delta.get("reasoning_content"):
            self._reasoning.append(thought)
        for part in delta.get("tool_calls") or ():
            call = self._calls.setdefault(part.get("index", 0), {"type": "function", "function": {"arguments": ""}})
            function = part.get("function") or {}
            call["function"]["arguments"] += function.get("arguments") or ""
            if "name" in function:
                call["function"]["name"] = function["name"]
            call.update({k: v for k, v in part.items() if k not in ("index", "function")})

    def _add_logprobs(self, logprobs: dict[str, list[Any] | None] | None) -> None:
        """Of a chat {"content": [...]}; of a completion four lists side by side. Either way lists that grow."""
        for name, items in (logprobs or {}).items():
            self._logprobs = self._logprobs or {}
            known = self._logprobs.setdefault(name, None)
            if items is not None:
                if known is None:
                    known = self._logprobs[name] = []
                known.extend(items)

    def whole(self, index: int) -> dict[str, Any]:
        text = "".join(self._text)
        if not self._is_chat:
            return {"text": text, "index": index, "logprobs": self._logprobs, **self._rest}
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not self._calls else None}
        message["refusal"] = None  # OpenAI's description requires it, as it does logprobs
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [self._calls[i] for i in sorted(self._calls)]
        return {"index": index, "message": message, "logprobs": self._logprobs, **self._rest}
