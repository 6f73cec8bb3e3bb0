"""The small calls of the control plane, over the same connections as the relay's."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from tests.helpers.aio import run
from tests.helpers.raw import RawUpstream, closed_by_peer, until
from tests.integration.relay.test_faults import _hang, _ok

from helexa.core.relay.server import Server
from helexa.core.relay.upstream import Upstream


def test_connections_are_kept_between_reads_and_never_used_for_what_changes_something() -> None:
    async def main() -> None:
        server = Server(director=None, app=_app)
        host, port = await server.listen("127.0.0.1", 0)
        node = Upstream("n", f"http://{host}:{port}/base", headers={"authorization": "Bearer t"})
        try:
            for _ in range(3):
                answer = await node.fetch("GET", "/models")
                assert (answer.status, answer.json()) == (200, {"path": "/base/models", "auth": "Bearer t", "body": ""})
            assert node.open_connections == 1
            posted = await node.fetch("POST", "/models/load", b"{}")
            assert posted.json()["body"] == "{}"
            assert node.open_connections == 2, "a kept connection may be closing: a load must not be sent twice"
        finally:
            node.close()
            await until(lambda: node.open_connections == 0)
            await server.close()

    run(main())


async def _app(scope: Any, receive: Any, send: Any) -> None:
    import json

    body = (await receive())["body"]
    auth = dict(scope["headers"]).get(b"authorization", b"").decode()
    answer = json.dumps({"path": scope["path"], "auth": auth, "body": body.decode()}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": answer})


def test_a_connection_that_its_engine_closes_after_the_answer_is_replaced_before_the_next_request() -> None:
    async def main() -> None:
        async with RawUpstream(_answer_and_close) as engine:
            host = Upstream("m", engine.url, renew=True)
            try:
                for asked in range(1, 4):
                    await host.fetch("GET", "/slots", b"")
                    await until(lambda asked=asked: engine.connections == asked + 1 and host.open_connections == 1)
                    assert engine.requests == asked
            finally:
                host.close()
            await until(lambda: host.open_connections == 0)
            assert engine.connections == 4, "nothing is opened for a pool that is closed"

    run(main())


def test_a_pool_that_is_cut_replaces_nothing() -> None:
    async def main() -> None:
        async with RawUpstream(_ok) as engine:
            host = Upstream("m", engine.url, renew=True)
            await host.fetch("GET", "/slots", b"")
            assert host.open_connections == 1
            host.abort()
            await until(lambda: host.open_connections == 0)
            assert not host._renewals

    run(main())


def test_a_replacement_that_nobody_used_is_not_replaced_again_when_the_engine_tires_of_it() -> None:
    async def main() -> None:
        accepted = 0

        async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal accepted
            accepted += 1
            if accepted == 1:
                await reader.readuntil(b"\r\n\r\n")
                await _ok(reader, writer, b"")
            writer.close()

        server = await asyncio.start_server(once, "127.0.0.1", 0)
        host = Upstream("m", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", renew=True)
        await host.fetch("GET", "/slots")
        await until(lambda: accepted == 2 and host.open_connections == 0)
        assert not host._renewals
        server.close()

    run(main())


async def _answer_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    await _ok(reader, writer, request)
    raise ConnectionError


def test_a_call_ends_at_its_deadline_and_its_connection_with_it() -> None:
    async def main() -> None:
        async with RawUpstream(_hang) as silent:
            node = Upstream("n", silent.url)
            with pytest.raises(TimeoutError):
                await node.fetch("POST", "/x", b"{}", timeout_s=0.1)
            async with asyncio.timeout(1):
                await silent.gone.wait()
            assert node.open_connections == 0

    run(main())


def test_an_answer_over_the_limit_and_one_that_breaks_off_are_errors() -> None:
    async def main() -> None:
        async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            writer.close()
            raise ConnectionResetError

        async with RawUpstream(_ok) as well, RawUpstream(half) as ill:
            for url, error in ((well.url, ValueError), (ill.url, ConnectionError)):
                node = Upstream("n", url)
                with pytest.raises(error):
                    await node.fetch("POST", "/x", b"{}", limit=1 if error is ValueError else 100)
                node.close()
                await until(lambda: node.open_connections == 0)  # noqa: B023

    run(main())


def test_leaving_a_stream_early_cuts_it() -> None:
    async def main() -> None:
        async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
            await closed_by_peer(reader)

        async with RawUpstream(endless) as events:
            node = Upstream("n", events.url)
            async with node.stream("POST", "/events", b"", idle_s=0.2) as stream:
                parts = aiter(stream)
                assert await anext(parts) == b"hi"
                with pytest.raises(TimeoutError):
                    await anext(parts)
            async with asyncio.timeout(1):
                await events.gone.wait()

    run(main())


def test_a_name_is_looked_up_once_in_a_while_and_its_last_good_address_serves_when_a_look_up_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with RawUpstream(_ok) as well:
            looked_up = 0

            async def look_up(host: str, port: int, **_: Any) -> list[Any]:
                nonlocal looked_up
                looked_up += 1
                if looked_up > 1:
                    raise socket.gaierror("no answer")
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

            monkeypatch.setattr(
                asyncio.get_running_loop().__class__, "getaddrinfo", lambda _, *a, **k: look_up(*a, **k)
            )
            node = Upstream("n", well.url.replace("127.0.0.1", "beast.internal"))
            for _ in range(3):
                assert (await node.fetch("POST", "/x", b"{}")).body == b"{}"
            assert looked_up == 1
            monkeypatch.setattr("helexa.core.relay.upstream.LOOKUP_S", -1e9)
            assert (await node.fetch("POST", "/x", b"{}")).body == b"{}"
            assert looked_up == 2
            node.close()

    asyncio.run(main())


def test_an_address_that_is_none_is_refused_with_an_example() -> None:
    for url in ("beast:13131", "https://beast", "http://"):
        with pytest.raises(ValueError, match="http://host:port"):
            Upstream("n", url)
