"""`cortex chat`: a conversation on the terminal, streamed, with the speed of each answer."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from helexa.core.sse import Event
from helexa.cortex.client import DEFAULT_URL, Client, CommandFailed
from helexa.cortex.operate import Progress

_HELP: Final = "/exit ends, /clear forgets the conversation, Ctrl-C stops an answer."
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass(slots=True)
class Answer:
    """One answer as it was received. stopped: cut short by the user."""

    text: str = ""
    finish_reason: str | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    stopped: bool = False

    def figures(self) -> str:
        """ "48 tokens, 31.2 tok/s, first after 0.21 s"; what is not known is left out."""
        parts = []
        if self.tokens is not None:
            parts.append(f"{self.tokens} token{'' if self.tokens == 1 else 's'}")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tok/s")
        if self.first_token_s is not None:
            parts.append(f"first after {self.first_token_s:.2f} s")
        if self.stopped:
            parts.append("stopped")
        elif self.finish_reason == "length":
            parts.append("cut at max_tokens")
        return ", ".join(parts)


@dataclass(slots=True)
class Chat:
    """A conversation with one model. write gets each piece of an answer as it comes, and whether it is reasoning."""

    url: str | None
    model: str
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    async def ask(self, text: str, write: Callable[[str, bool], None], note: Callable[[str], None]) -> Answer:
        """Sends `text` and streams the answer. note: how a load stands, "" when there is nothing to say. A cancel
        stops the generation; what came until then stays in the conversation."""
        self.messages.append({"role": "user", "content": text})
        answer = Answer()
        began = time.monotonic()
        try:
            async with (
                Client(self.url or DEFAULT_URL) as gateway,
                gateway.events("/v1/chat/completions", self._body()) as events,
            ):
                await _receive(events, answer, write, note, began)
        except asyncio.CancelledError:
            answer.stopped = True
        except CommandFailed:
            self.messages.pop()  # it was not answered; asked again, it must not be there twice
            raise
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer

    def _body(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *self.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        return body


async def _receive(
    events: AsyncIterator[Event],
    answer: Answer,
    write: Callable[[str, bool], None],
    note: Callable[[str], None],
    began: float,
) -> None:
    first = 0.0
    async for event in events:
        if event.comment:
            note(event.data.decode("utf-8", "replace"))
            continue
        if event.data == b"[DONE]":
            break
        chunk = msgspec.json.decode(event.data)
        if error := chunk.get("error"):
            raise CommandFailed(error.get("message") or "the answer broke off")
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            for key, is_reasoning in (("reasoning_content", True), ("content", False)):
                if piece := delta.get(key):
                    if not first:
                        first = time.monotonic()
                        answer.first_token_s = first - began
                        note("")
                    write(piece, is_reasoning)
                    if not is_reasoning:
                        answer.text += piece
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        _note_figures(chunk, answer, time.monotonic() - first if first else 0.0)


def _note_figures(chunk: dict[str, Any], answer: Answer, seconds: float) -> None:
    """The engine's own speed where it says; else what passed here."""
    if usage := chunk.get("usage"):
        answer.tokens = usage.get("completion_tokens")
        answer.prompt_tokens = usage.get("prompt_tokens")
        if answer.tokens_per_s is None and answer.tokens and answer.tokens > 1 and seconds > 0:
            answer.tokens_per_s = (answer.tokens - 1) / seconds
    timings = chunk.get("timings") or {}
    count, took_ms = timings.get("predicted_n"), timings.get("predicted_ms")
    if count and took_ms:
        answer.tokens_per_s = count / took_ms * 1000


class Printer:
    """Pieces of an answer to stdout; reasoning dim, and only on a terminal."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._dim = False
        self._in_line = False

    def write(self, piece: str, is_reasoning: bool) -> None:
        if not self._is_terminal:
            if not is_reasoning:
                self._put(piece)
            return
        if is_reasoning != self._dim:
            sys.stdout.write(_DIM if is_reasoning else f"{_PLAIN}\n")
            self._dim = is_reasoning
        self._put(piece)

    def end(self) -> None:
        if self._dim:
            sys.stdout.write(_PLAIN)
            self._dim = False
        if self._in_line:
            self._put("\n")

    def _put(self, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()
        self._in_line = not piece.endswith("\n")


def ask_stoppable(chat: Chat, text: str) -> Answer:
    """One turn on the terminal; Ctrl-C stops it and not the program."""
    printer, progress = Printer(), Progress()

    def note(line: str) -> None:
        progress.show(line) if line else progress.clear()

    async def turn() -> Answer:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
        return await chat.ask(text, printer.write, note)

    try:
        return asyncio.run(turn())
    finally:
        progress.clear()
        printer.end()


def converse(chat: Chat) -> int:
    """The loop of `cortex chat`; the exit code."""
    if not sys.stdin.isatty():
        text = sys.stdin.read().strip()
        if not text:
            raise CommandFailed("nothing was asked: stdin is empty", 2)
        answer = ask_stoppable(chat, text)
        sys.stderr.write(f"[{answer.figures()}]\n")
        return 130 if answer.stopped else 0
    import readline  # noqa: F401 - history and line editing for input()

    asyncio.run(_must_exist(chat))
    sys.stderr.write(f"{chat.model}. {_HELP}\n")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            sys.stderr.write("\n")
            return 0
        except KeyboardInterrupt:
            sys.stderr.write("\n(Ctrl-D or /exit ends)\n")
            continue
        if text in ("/exit", "/quit", "/bye"):
            return 0
        if text == "/clear":
            chat.messages.clear()
        elif text in ("/help", "/?"):
            sys.stderr.write(f"{_HELP}\n")
        elif text:
            try:
                answer = ask_stoppable(chat, text)
            except CommandFailed as failed:
                sys.stderr.write(f"cortex: {failed}\n")
            else:
                sys.stderr.write(f"{_DIM}[{answer.figures()}]{_PLAIN}\n")


async def _must_exist(chat: Chat) -> None:
    """A mistyped name is told before the first question. It does not load the model."""
    async with Client(chat.url or DEFAULT_URL) as gateway:
        await gateway.get(f"/v1/models/{chat.model}")
