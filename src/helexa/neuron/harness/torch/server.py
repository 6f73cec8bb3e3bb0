"""The HTTP side of a model's host: the neuron's chat dialect on a Unix socket, over an engine. Imports no torch.

It lives on a loop and a thread of its own, so that it never waits for a step: what is asked goes to the engine as a
note, what the engine tells comes back through a Mailbox, and what takes time (templates, tokenizers, grammars) runs on
a few threads beside. A client that leaves cancels what it asked for.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec

from helexa.core import sse
from helexa.core.config import Timeouts
from helexa.core.errors import (
    Dialect,
    HelexaError,
    InvalidApiKey,
    NotFound,
    ShuttingDown,
    render,
    render_event,
)
from helexa.core.relay.asgi import Message
from helexa.core.relay.server import Server
from helexa.neuron.harness.collect import Collector
from helexa.neuron.harness.openai_lists import CHAT, COMPLETIONS, EMBEDDINGS
from helexa.neuron.harness.torch.chunks import Answer, Chunk
from helexa.neuron.harness.torch.request import Emit, Event, Request
from helexa.neuron.harness.torch.work import Desk, Embedding, Generation

HEALTH: Final = "/health"
COUNT: Final = "/v1/tokens/count"
BODY_LIMIT_MB: Final = 1024  # the daemon's own limit comes before it
THREADS: Final = 2  # for templates, tokenizers and grammars
IDLE_S: Final = 3600.0  # the daemon alone holds connections, and closes them itself
_encode = msgspec.json.Encoder().encode

T = TypeVar("T")
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class EngineSide(Protocol):
    """What of an Engine is used here."""

    def submit(self, request: Request, emit: Emit) -> Any: ...

    def cancel(self, handle: Any) -> None: ...


class Mailbox:
    """Events of one exchange, from the engine's thread to the loop's. None: the client has left."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._items: list[tuple[int, Event] | None] = []
        self._woken: asyncio.Future[None] | None = None

    def emit(self, index: int) -> Emit:
        """For the engine's thread: the events of choice `index` come here."""
        return lambda event: self._post.put(self, (index, event))

    def add(self, item: tuple[int, Event] | None) -> None:
        """On the loop."""
        self._items.append(item)
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def take(self) -> list[tuple[int, Event] | None]:
        """All that has come; waits for the first."""
        if not self._items:
            self._woken = asyncio.get_running_loop().create_future()
            await self._woken
        items, self._items = self._items, []
        return items


class Post:
    """HOT: from the engine's thread to the loop, with one wake-up for all events of a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[Mailbox, tuple[int, Event]]] = deque()
        self._on_its_way = False

    def put(self, mailbox: Mailbox, item: tuple[int, Event]) -> None:
        """From the engine's thread."""
        self._items.append((mailbox, item))
        if not self._on_its_way:
            self._on_its_way = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                pass  # the loop has closed: nobody is left to hear

    def _deliver(self) -> None:
        self._on_its_way = False  # before the look: what is put from now on calls again
        while self._items:
            mailbox, item = self._items.popleft()
            mailbox.add(item)


class App:
    """The ASGI application. engine: None in a host that only counts."""

    def __init__(self, desk: Desk, engine: EngineSide | None, api_key: str) -> None:
        self._desk = desk
        self._engine = engine
        self._authorization = f"Bearer {api_key}".encode()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="prompts")
        self._post = Post(asyncio.get_running_loop())
        self._paths: dict[str, Callable[[bytes, Receive, Send], Coroutine[Any, Any, None]]] = {COUNT: self._count}
        if engine is not None:
            self._paths |= {
                CHAT: lambda *call: self._generate(desk.chat, *call),
                COMPLETIONS: lambda *call: self._generate(desk.completion, *call),
                EMBEDDINGS: self._embed,
            }

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        request_id: str = scope["state"]["request_id"]
        try:
            if scope["path"] == HEALTH:
                await _answer(send, 200, b'{"status":"ok"}')
                return
            self._check_key(scope)
            handler = self._paths.get(scope["path"]) if scope["method"] == "POST" else None
            if handler is None:
                raise NotFound(f"{scope['method']} {scope['path']} is not served by a model's host.")
            await handler((await receive())["body"], receive, send)
        except HelexaError as error:
            headers = [] if error.retry_after_s is None else [(b"retry-after", b"%d" % error.retry_after_s)]
            await _answer(send, error.status, render(error, Dialect.OPENAI, request_id), headers)
        except ConnectionResetError:
            pass  # the client left while it was written to

    def _check_key(self, scope: Message) -> None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(given, self._authorization):
            raise InvalidApiKey("This socket belongs to the neuron's daemon; ask the neuron itself.")

    async def _beside(self, work: Callable[..., T], *args: Any) -> T:
        """On a thread, so that the loop goes on."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
        except RuntimeError as err:
            if "shutdown" in str(err):
                raise ShuttingDown(f"{self._desk.model} is being unloaded") from err
            raise

    # generation

    async def _generate(self, read: Callable[[bytes], Generation], body: bytes, receive: Receive, send: Send) -> None:
        mailbox = Mailbox(self._post)
        leaving = asyncio.ensure_future(_when_gone(receive, mailbox))
        handles: list[Any] = []
        try:
            asked = await self._beside(read, body)
            await self._beside(self._submit, asked.requests, mailbox, handles)
            answer = asked.answer(f"{asked.prefix}{secrets.token_hex(12)}", int(time.time()))
            if asked.stream:
                await self._stream(answer, mailbox, send)
            else:
                await self._whole(answer, mailbox, send)
        finally:
            leaving.cancel()
            assert self._engine is not None
            for handle in handles:  # of no effect on those that ended
                self._engine.cancel(handle)

    def _submit(self, requests: Sequence[Request], mailbox: Mailbox, handles: list[Any]) -> None:
        assert self._engine is not None
        for index, request in enumerate(requests):
            handles.append(self._engine.submit(request, mailbox.emit(index)))

    async def _stream(self, answer: Answer, mailbox: Mailbox, send: Send) -> None:
        """Nothing goes out before there is something to tell: until then an error has its status, and the daemon may
        ask elsewhere."""
        begun = False
        while not answer.is_over:
            out: list[bytes] = []
            failure: HelexaError | None = None
            for item in await mailbox.take():
                if item is None:
                    return
                try:
                    out += [sse.frame(_encode(chunk)) for chunk in answer.take(*item)]
                except HelexaError as error:
                    failure = error
                    break
            if failure is not None and not begun and not out:
                raise failure
            if failure is not None:
                out.append(render_event(failure, Dialect.OPENAI, ""))
            if not out:
                continue
            if not begun:
                begun = True
                await send(_STREAM_START)
            if answer.is_over and failure is None:
                out.append(sse.frame(b"[DONE]"))
            over = answer.is_over or failure is not None
            await send({"type": "http.response.body", "body": b"".join(out), "more_body": not over})
            if failure is not None:
                return

    async def _whole(self, answer: Answer, mailbox: Mailbox, send: Send) -> None:
        collector = Collector()
        while not answer.is_over:
            for item in await mailbox.take():
                if item is None:
                    return
                chunks: list[Chunk] = answer.take(*item)
                for chunk in chunks:
                    collector.add(chunk)
        await _answer(send, 200, _encode(collector.answer()))

    # the rest

    async def _embed(self, body: bytes, receive: Receive, send: Send) -> None:
        mailbox = Mailbox(self._post)
        leaving = asyncio.ensure_future(_when_gone(receive, mailbox))
        handles: list[Any] = []
        try:
            asked: Embedding = await self._beside(self._desk.embedding, body)
            await self._beside(self._submit, asked.requests, mailbox, handles)
            while not asked.is_over:
                for item in await mailbox.take():
                    if item is None:
                        return
                    asked.take(*item)
            await _answer(send, 200, await self._beside(lambda: _encode(asked.answer())))
        finally:
            leaving.cancel()
            assert self._engine is not None
            for handle in handles:
                self._engine.cancel(handle)

    async def _count(self, body: bytes, receive: Receive, send: Send) -> None:
        await _answer(send, 200, _encode({"input_tokens": await self._beside(self._desk.count, body)}))


_STREAM_START: Final[Message] = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")],
}


async def _answer(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def _when_gone(receive: Receive, mailbox: Mailbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    mailbox.add(None)


class SocketServer:
    """An App that answers on a Unix socket, on a thread of its own, from `start` to `close`. Both block."""

    def __init__(self, desk: Desk, engine: EngineSide | None, *, socket: Path, api_key: str) -> None:
        self._desk = desk
        self._engine = engine
        self._socket = socket
        self._api_key = api_key
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Returns when it answers. Raises RuntimeError where the socket cannot be had."""
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise RuntimeError(f"the socket {self._socket} cannot be had: {self._error}") from self._error

    def close(self) -> None:
        """Connections are cut."""
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None and self._thread.is_alive():
            loop.call_soon_threadsafe(stop.set)
        self._thread.join()
        self._socket.unlink(missing_ok=True)

    def _run(self) -> None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                runner.run(self._serve())
            except BaseException as err:
                self._error = err
            finally:
                self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._socket.unlink(missing_ok=True)
        app = App(self._desk, self._engine, self._api_key)
        timeouts = Timeouts(idle_s=IDLE_S)
        server = Server(director=None, app=app, timeouts=timeouts, body_limit_mb=BODY_LIMIT_MB, inside=True)
        await server.listen_unix(str(self._socket))
        self._ready.set()
        await self._stop.wait()
        app.close()
        await server.close()
