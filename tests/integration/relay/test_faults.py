"""Bad luck on real sockets: every end of an exchange, its message, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.helpers.aio import run
from tests.helpers.raw import RawUpstream, Script, client_of, closed_by_peer, until
from tests.helpers.wires import CHAT, Recorder

from helexa.core.config import Timeouts
from helexa.core.errors import ShuttingDown
from helexa.core.relay.contract import Exchange, Route
from helexa.core.relay.server import Server
from helexa.core.relay.upstream import Upstream

STREAM = b'{"model":"qwen","stream":true}'
WHOLE = b'{"model":"qwen"}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DELTA = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Gateway:
    def __init__(self, server: Server, director: Recorder, port: int) -> None:
        self.server, self.director, self.port = server, director, port

    def client(self, **options: Any) -> Any:
        return client_of(self.server, self.port, **options)


@asynccontextmanager
async def gateway(
    *upstreams: RawUpstream | DeadPort, timeouts: Timeouts | None = None, **route: Any
) -> AsyncIterator[Gateway]:
    """A server before these upstreams. At its end nothing may be left: no route, connection, exchange or task."""
    pools = [Upstream(f"n{i}", u.url, connect_s=1) for i, u in enumerate(upstreams)]
    director = Recorder(*pools, **route)
    server = Server(director=director, endpoints=[CHAT], timeouts=timeouts)
    _, port = await server.listen("127.0.0.1", 0)
    try:
        yield Gateway(server, director, port)
        await until(lambda: not server.connections)
        assert director.open_routes == 0
        assert server.inflight == 0
        assert len(director.finished) == len({id(x) for x in director.finished})
    finally:
        for pool in pools:
            pool.close()
        await server.close()
    ours = {asyncio.current_task()}
    left = [t for t in asyncio.all_tasks() - ours if "RawUpstream" not in repr(t.get_coro())]
    assert left == []


class DeadPort:
    """An address that nobody listens on, and that nobody else can be given meanwhile: bound, and no more."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> DeadPort:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


async def _hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    await closed_by_peer(reader)


async def _ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    writer.write(OK)


def one_event_then(end: Script) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        writer.write(HEAD + chunk(DELTA))
        await end(reader, writer, request)

    return script


async def _close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    writer.close()
    await writer.wait_closed()
    raise ConnectionResetError


@pytest.mark.parametrize("body", [STREAM, WHOLE])
def test_a_node_that_cannot_be_reached_is_passed_over_and_only_the_last_failure_is_told(body: bytes) -> None:
    async def main() -> None:
        with DeadPort() as one, DeadPort() as two:
            async with RawUpstream(_ok) as well, gateway(one, well) as g, g.client() as c:
                await c.post(body)
                assert await c.answer() == (200, b"{}")
                assert [e.code for e, _ in g.director.failures] == ["upstream_error"]
            async with gateway(one, two) as g, g.client() as c:
                await c.post(body)
                status, answer = await c.answer()
            assert status == 502
            assert "n1 cannot be reached" in json.loads(answer)["error"]["message"]

    run(main())


@pytest.mark.parametrize("body", [STREAM, WHOLE])
def test_a_node_that_dies_before_its_first_byte_is_replaced_by_another(body: bytes) -> None:
    async def main() -> None:
        async with RawUpstream(_close) as ill, RawUpstream(_ok) as well, gateway(ill, well) as g, g.client() as c:
            await c.post(body)
            assert await c.answer() == (200, b"{}")

    run(main())


def test_a_node_that_dies_mid_stream_is_told_in_an_event_then_the_end_and_never_a_done() -> None:
    async def main() -> None:
        async with RawUpstream(one_event_then(_close)) as ill, RawUpstream(_ok) as well:
            async with gateway(ill, well) as g, g.client() as c:
                await c.post(STREAM)
                status, body = await c.answer()
                assert status == 200
                first, last = body.split(b"\n\n")[:2]
                assert first + b"\n\n" == DELTA
                assert json.loads(last[5:])["error"]["code"] == "upstream_error"
                assert await c.reader.read() == b"", "the connection ended"
            assert well.requests == 0, "what the client has seen is never begun anew elsewhere"

    run(main())


def test_a_connection_that_its_node_closed_while_it_was_idle_is_replaced_in_silence() -> None:
    async def main() -> None:
        answered = 0

        async def once_a_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            nonlocal answered
            answered += 1
            if answered == 2:
                await _close(reader, writer, request)  # the second request of the kept connection
            writer.write(OK)

        async with RawUpstream(once_a_connection) as node, gateway(node) as g, g.client() as c:
            for _ in range(2):
                await c.post(WHOLE)
                assert await c.answer() == (200, b"{}")
            assert g.director.failures == []
            assert node.connections == 2
            assert node.requests == 3

    run(main())


@pytest.mark.parametrize("body", [STREAM, WHOLE])
@pytest.mark.parametrize("started", [False, True], ids=["in prefill", "in decode"])
def test_a_client_that_leaves_ends_the_generation_at_once(body: bytes, started: bool) -> None:
    async def main() -> None:
        script = one_event_then(_hang) if started and body is STREAM else _hang
        async with RawUpstream(script) as node, gateway(node) as g:
            async with g.client() as c:
                await c.post(body)
                if started and body is STREAM:
                    await c.head()
                else:
                    await until(lambda: node.requests == 1)
            async with asyncio.timeout(1.0):
                await node.gone.wait()
            (exchange,) = g.director.finished
            assert exchange.client_gone

    run(main())


def test_a_client_that_leaves_while_it_waits_for_a_load_cancels_the_wait() -> None:
    async def main() -> None:
        cancelled = asyncio.Event()

        async def for_ever() -> Route:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
            raise AssertionError

        def wait(exchange: Exchange) -> Awaitable[Route]:
            return for_ever()

        async with gateway() as g:
            g.director.on_route = wait
            async with g.client() as c:
                await c.post(STREAM)
                await until(lambda: bool(g.director.exchanges))
            async with asyncio.timeout(1.0):
                await cancelled.wait()

    run(main())


def test_a_stream_that_waits_gets_its_head_and_a_heartbeat_within_two_seconds_and_then_the_answer() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            await go.wait()
            writer.write(HEAD + chunk(DELTA) + chunk(DONE) + b"0\r\n\r\n")

        async with RawUpstream(slow) as node, gateway(node) as g:
            loading = asyncio.Event()

            async def loaded() -> Route:
                await loading.wait()
                g.director.open_routes += 1
                return Route(g.director.upstreams[0])

            g.director.on_route = lambda exchange: loaded()
            async with g.client() as c:
                await c.post(STREAM)
                async with asyncio.timeout(2.5):
                    head = await c.head()
                    chunks = c.chunks()
                    first = await anext(chunks)
                assert b"text/event-stream" in head
                assert first == b": loading: 43 %\n\n"
                loading.set()
                async with asyncio.timeout(2.5):
                    assert await anext(chunks) == b":\n\n", "in prefill there is nothing to say but that it lives"
                go.set()
                rest = b"".join([piece async for piece in chunks])
                assert rest.replace(b":\n\n", b"") == DELTA + DONE
                assert not g.director.finished[0].error

    run(main())


def test_a_stall_is_a_504_before_the_first_byte_and_an_error_event_after_it() -> None:
    async def main() -> None:
        quick = Timeouts(stall_s=1)
        async with RawUpstream(_hang) as node, gateway(node, timeouts=quick) as g, g.client() as c:
            await c.post(WHOLE)
            status, body = await c.answer()
            assert status == 504
            assert json.loads(body)["error"]["code"] == "upstream_timeout"
            assert "n0 stalled" in json.loads(body)["error"]["message"]
        async with RawUpstream(one_event_then(_hang)) as node, gateway(node, timeouts=quick) as g, g.client() as c:
            await c.post(STREAM)
            status, body = await c.answer()
            assert status == 200
            assert json.loads(body.split(b"\n\n")[1][5:])["error"]["code"] == "upstream_timeout"
            assert b"[DONE]" not in body
            async with asyncio.timeout(1.0):
                await node.gone.wait()

    run(main())


def test_silence_of_a_host_that_makes_progress_is_no_stall() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            await go.wait()
            writer.write(OK)

        async with RawUpstream(slow) as node, gateway(node, timeouts=Timeouts(stall_s=0.5)) as g, g.client() as c:
            asked = asyncio.Event()
            g.director.is_stalled = lambda *_: bool(asked.set())  # type: ignore[method-assign]
            await c.post(WHOLE)
            await asked.wait()
            go.set()
            assert await c.answer() == (200, b"{}")

    run(main())


def test_a_slow_reader_holds_back_its_own_upstream_loses_nothing_and_no_one_else_waits() -> None:
    async def main() -> None:
        total = 400
        big = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 65_000 + b'"}}]}\n\n'
        sent = 0

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            nonlocal sent
            if b"small" in request:
                writer.write(OK)
                return
            writer.write(HEAD)
            for _ in range(total):
                writer.write(chunk(big))
                await writer.drain()
                sent += 1
            writer.write(chunk(DONE) + b"0\r\n\r\n")

        async with RawUpstream(flood) as node, gateway(node) as g, g.client(limit=1 << 16) as slow:
            await slow.post(STREAM)
            await slow.head()
            last = -1
            while last != sent:  # until nothing moves any more: every buffer between is full
                last = sent
                await asyncio.sleep(0.2)
            assert sent < total, "26 MB did not fit into the buffers"
            async with g.client() as other:
                await other.post(b'{"model":"small"}')
                async with asyncio.timeout(1.0):
                    assert await other.answer() == (200, b"{}")
            got = b"".join([piece async for piece in slow.chunks()])
            assert got == big * total + DONE

    run(main())


def test_a_client_that_never_reads_is_cut_and_its_upstream_with_it() -> None:
    async def main() -> None:
        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            writer.write(HEAD)
            while True:
                writer.write(chunk(DELTA * 1000))
                await writer.drain()

        async with RawUpstream(flood) as node, gateway(node, timeouts=Timeouts(stall_s=1)) as g:
            async with g.client(limit=1 << 16) as c:
                await c.post(STREAM)
                async with asyncio.timeout(10):
                    await node.gone.wait()
            assert g.director.finished[0].client_gone

    run(main())


def test_a_head_or_a_body_that_never_comes_is_a_408() -> None:
    async def main() -> None:
        async with gateway(timeouts=Timeouts(head_s=1)) as g, g.client() as c:
            c.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\n")
            status, body = await c.answer()
            assert status == 408
            assert json.loads(body)["error"]["code"] == "request_timeout"
            assert await c.reader.read() == b""

    run(main())


def test_an_idle_connection_is_closed_without_a_word() -> None:
    async def main() -> None:
        async with RawUpstream(_ok) as node, gateway(node, timeouts=Timeouts(idle_s=1)) as g, g.client() as c:
            await c.post(WHOLE)
            assert await c.answer() == (200, b"{}")
            async with asyncio.timeout(4):
                assert await c.reader.read() == b""

    run(main())


def test_a_drain_lets_running_streams_finish_and_refuses_new_requests() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def two(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            writer.write(HEAD + chunk(DELTA))
            await go.wait()
            writer.write(chunk(DONE) + b"0\r\n\r\n")

        async with RawUpstream(two) as node, gateway(node) as g, g.client() as running, g.client() as late:
            await running.post(STREAM)
            await running.head()
            g.server.stop_accepting(ShuttingDown("closing; ask another gateway", retry_after_s=7))
            draining = asyncio.ensure_future(g.server.drain(5))
            await late.post(STREAM)
            head = (await late.head()).lower()
            assert head.startswith(b"http/1.1 503")
            assert b"retry-after: 7" in head
            go.set()
            assert b"".join([piece async for piece in running.chunks()]) == DELTA + DONE
            assert await draining == 0

    run(main())


def test_a_drain_that_runs_out_tells_the_client_in_an_event() -> None:
    async def main() -> None:
        async with RawUpstream(one_event_then(_hang)) as node, gateway(node) as g, g.client() as c:
            await c.post(STREAM)
            await c.head()
            assert await g.server.drain(0.05) == 1
            got = b"".join([piece async for piece in c.chunks()])
            assert json.loads(got.split(b"\n\n")[1][5:])["error"]["code"] == "shutting_down"
            async with asyncio.timeout(1):
                await node.gone.wait()

    run(main())


def test_a_node_that_answers_what_is_not_http_is_a_502() -> None:
    async def main() -> None:
        async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

        async with RawUpstream(garbage) as node, gateway(node) as g, g.client() as c:
            await c.post(WHOLE)
            status, body = await c.answer()
            assert status == 502
            assert "not HTTP" in json.loads(body)["error"]["message"]

    run(main())
