"""The serving side of the torch harness over an engine that does as the test says: no weights, no torch."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from helexa.core import sse
from helexa.core.relay.upstream import Answer, Upstream
from helexa.neuron.harness.torch import TorchHarness
from helexa.neuron.harness.torch.prompts import Prompts
from helexa.neuron.harness.torch.request import Emit, Event, Finished, Progress, Request, Text, Timings, Usage
from helexa.neuron.harness.torch.server import SocketServer
from helexa.neuron.harness.torch.work import Desk

KEY = "secret"


def need_torch() -> None:
    """Skips where the torch harness cannot run."""
    if (why := TorchHarness().why_not()) is not None:
        pytest.skip(why)


CONTEXT = 256
VOCABULARY = 128


class Letters:
    """A tokenizer of one token for each character. special: begins with a token 1."""

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(ids=[*([1] if add_special_tokens else []), *(ord(c) % VOCABULARY for c in text)])

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return {}


class Roles:
    """A chat template of `role:content|` for each message; knows no tools."""

    text = ""

    def render(self, messages: Any, **_: Any) -> str:
        return "".join(f"{m['role']}:{m['content']}|" for m in messages)


@dataclass
class Asked:
    """A request that reached the engine; `tell` is the engine's side of it. cancelled: set when it was."""

    request: Request
    emit: Emit

    def __post_init__(self) -> None:
        self.cancelled = threading.Event()

    def tell(self, *events: Event) -> None:
        for event in events:
            self.emit(event)

    def say(self, *texts: str, reason: Any = "stop", stop_reason: str | None = None, cached: int = 0) -> None:
        self.tell(
            *(Text(text, 1) for text in texts), ended(len(self.request.prompt), len(texts), reason, stop_reason, cached)
        )


def ended(prompt: int, tokens: int, reason: Any = "stop", stop: str | None = None, cached: int = 0) -> Finished:
    return Finished(reason, stop, Usage(prompt, tokens, cached), Timings(prompt - cached, 20.0, tokens, 50.0, cached))


class PlayedEngine:
    """Answers each request with the texts it is given, or, where it is given none, waits for the test."""

    def __init__(self, texts: Sequence[str] | None = None) -> None:
        self.asked: list[Asked] = []
        self._texts = texts
        self._news = threading.Condition()

    def submit(self, request: Request, emit: Emit) -> Asked:
        asked = Asked(request, emit)
        with self._news:
            self.asked.append(asked)
            self._news.notify_all()
        if self._texts is not None:
            n = len(request.prompt)
            if request.progress:
                asked.tell(Progress(n, 0, 0, 0.0), Progress(n, 0, n, 20.4))
            asked.say(*self._texts)
        return asked

    def cancel(self, handle: Asked) -> None:
        handle.cancelled.set()

    def wait_for(self, count: int = 1) -> list[Asked]:
        """Blocks until so many requests came."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.asked) >= count, 10), "no request came"
            return self.asked[:count]


class Host:
    def __init__(self, socket: Path, engine: PlayedEngine) -> None:
        self.socket = socket
        self.engine = engine

    def upstream(self, key: str = KEY) -> Upstream:
        return Upstream("host", f"unix:{self.socket}", headers={"authorization": f"Bearer {key}"})


@contextmanager
def host(
    engine: PlayedEngine, *, template: Any = Roles, counts: bool = False, context: int = CONTEXT
) -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="helexa-test-") as folder:
        prompts = Prompts(Letters(), template(), model="tiny", context=context, merges_system=False)
        desk = Desk(prompts, model="tiny", context=context, slots=4, vocabulary=VOCABULARY)
        socket = Path(folder) / "s"
        server = SocketServer(desk, None if counts else engine, socket=socket, api_key=KEY)
        server.start()
        try:
            yield Host(socket, engine)
        finally:
            server.close()


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """The data of a stream that ended well."""
    assert answer.status == 200, answer.body
    *events, done = sse.EventReader().feed(answer.body)
    assert done.data == b"[DONE]"
    return [msgspec.json.decode(event.data) for event in events]
