"""Small real programs at both ends of a connection: an upstream that plays a script, and a client that speaks bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from helexa.core.relay.server import Server

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]


class RawUpstream:
    """Reads a request, then lets `script` do with the connection what it will, again and again."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests = 0
        self.connections = 0
        self.gone = asyncio.Event()  # a connection was closed by the other end
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> RawUpstream:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer(reader, writer)
        finally:
            self._tasks.discard(task)
            self.gone.set()
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(row.partition(b":")[2])
                    for row in head.lower().split(b"\r\n")
                    if row.startswith(b"content-length")
                )
                body = await reader.readexactly(length)
                self.requests += 1
                await self.script(reader, writer, head + body)


async def closed_by_peer(reader: asyncio.StreamReader) -> None:
    """Until the other end is gone; what it still sends is thrown away."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(65536):
            pass


class RawClient:
    """One connection to a server of ours."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def post(self, body: bytes, *lines: str, path: str = "/v1/chat/completions") -> None:
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
        self.writer.write((head + "".join(f"{row}\r\n" for row in lines) + "\r\n").encode() + body)
        await self.writer.drain()

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of one answer that announces its length or comes in chunks."""
        head = (await self.head()).lower()
        status = int(head.split()[1])
        if b"content-length:" in head:
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            return status, await self.reader.readexactly(length)
        return status, b"".join([piece async for piece in self.chunks()])

    async def chunks(self) -> AsyncIterator[bytes]:
        """After the head: each chunk's data, until the last one."""
        while True:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
            if not size:
                return
            yield data[:-2]


@contextlib.asynccontextmanager
async def client_of(server: Server, port: int, *, limit: int = 1 << 20) -> AsyncIterator[RawClient]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=limit)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until(true: Callable[[], bool], *, within_s: float = 5.0) -> None:
    """A condition that another task brings about; TimeoutError where it does not."""
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.005)
