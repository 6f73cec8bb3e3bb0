"""Images by their address: what is fetched from a real server, and that nothing of one's own network ever is."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from tests.helpers.aio import run
from tests.helpers.exchanges import exchange

from helexa.core.errors import BadRequest, Overloaded
from helexa.core.relay.contract import Exchange
from helexa.neuron import image_fetch
from helexa.neuron.director import NodeDirector
from helexa.neuron.image_fetch import ImageFetcher, is_public

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels" * 100_000


DRIPPING, LEFT = threading.Event(), threading.Event()


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/picture":
            self._answer(200, PNG)
        elif self.path == "/page":
            self._answer(200, b"<html>")
        elif self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
        elif self.path == "/slow":
            self._answer(200, PNG, pause_s=0.2)
        elif self.path == "/drip":
            self._drip()
        elif self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", str(len(PNG)))
            self.end_headers()
            self.wfile.write(PNG[:100_000])
        elif self.path == "/large":
            self._answer(200, PNG[:8] + b"x" * (image_fetch.MAX_BYTES + 1))
        else:
            self._answer(404, b"")

    def _answer(self, status: int, body: bytes, *, pause_s: float = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            for at in range(0, len(body), 1 << 16):
                self.wfile.write(body[at : at + (1 << 16)])
                time.sleep(pause_s)
        except OSError:
            pass  # the fetcher has seen enough

    def _drip(self) -> None:
        """A head without an end, a byte now and then, until the other side has enough."""
        DRIPPING.set()
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
            while True:
                self.wfile.write(b".")
                time.sleep(0.01)
        except OSError:
            LEFT.set()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@contextmanager
def fetching(**options: Any) -> Iterator[ImageFetcher]:
    fetcher = ImageFetcher(**options)
    try:
        yield fetcher
    finally:
        fetcher.close()


def asking(*urls: str) -> bytes:
    parts = [{"type": "text", "text": "What is it?"}, *({"type": "image_url", "image_url": {"url": u}} for u in urls)]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}], "seed": 7}).encode()


def fetched(*urls: str, **options: Any) -> dict[str, Any]:
    with fetching(**options) as fetcher:
        assert fetcher.wants(asking(*urls))
        body: dict[str, Any] = json.loads(run(fetcher.into(asking(*urls))))
    return body


def anywhere(address: str) -> bool:
    return True


def test_a_picture_comes_into_the_request_and_nothing_else_of_it_changes(url: str) -> None:
    data = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    body = fetched(f"{url}/picture", data, f"{url}/to?/picture", may_reach=anywhere)
    text, *pictures = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    assert [part["image_url"]["url"] for part in pictures] == [data] * 3
    assert (body["model"], body["seed"]) == ("m", 7)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/page", "no picture"),
        ("/none", "404"),
        ("/large", "larger than 20 MB"),
        ("/to?file:///etc/passwd", "only http: and https:"),
        ("/to?/to?/to?/to?/to?/picture", "more than 3 times"),
    ],
)
def test_what_is_no_bounded_picture_is_refused_with_its_place(url: str, path: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as refused:
        fetched(f"{url}{path}", may_reach=anywhere)
    assert refused.value.param == "messages[0].content[1].image_url.url"


def test_a_slow_picture_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_fetch, "WITHIN_S", 0.3)
    with pytest.raises(BadRequest, match=r"within 0\.3 s"):
        fetched(f"{url}/slow", may_reach=anywhere)


def test_a_server_that_sends_a_byte_now_and_then_is_left_in_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_fetch, "WITHIN_S", 0.3)
    LEFT.clear()
    with pytest.raises(BadRequest, match=r"within 0\.3 s"):
        fetched(f"{url}/drip", may_reach=anywhere)
    assert LEFT.wait(10), "its thread is still there"


def test_a_client_that_leaves_ends_what_was_fetched_for_it(url: str) -> None:
    async def main(fetcher: ImageFetcher) -> None:
        into = asyncio.create_task(fetcher.into(asking(f"{url}/drip")))
        await asyncio.to_thread(DRIPPING.wait, 10)
        into.cancel()
        with pytest.raises(asyncio.CancelledError):
            await into
        assert await asyncio.to_thread(LEFT.wait, 10), "its thread is still there"

    DRIPPING.clear()
    LEFT.clear()
    with fetching(may_reach=anywhere) as fetcher:
        run(main(fetcher))


def test_half_a_picture_is_none(url: str) -> None:
    with pytest.raises(BadRequest, match="cannot be fetched"):
        fetched(f"{url}/short", may_reach=anywhere)


def test_what_is_too_much_together_is_refused_with_the_place_that_makes_it_so(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_fetch, "MAX_TOGETHER", len(PNG) * 2)
    picture = f"{url}/picture"
    with pytest.raises(BadRequest, match="together") as refused:
        fetched(picture, picture, picture, may_reach=anywhere)
    assert refused.value.param == "messages[0].content[3].image_url.url"


def test_nothing_of_one_s_own_network_is_fetched_not_even_after_a_redirect(url: str) -> None:
    for name in (url, url.replace("127.0.0.1", "localhost")):
        with pytest.raises(BadRequest, match="not public"):
            fetched(f"{name}/picture")
    inwards = f"{url}/to?http://localhost:{url.rpartition(':')[2]}/picture"
    judged = iter([True])  # the server that redirects passes for a public one
    with pytest.raises(BadRequest, match="not public: localhost"):
        fetched(inwards, may_reach=lambda address: next(judged, False))


def test_more_than_a_few_are_refused_before_any_is_fetched(url: str) -> None:
    with pytest.raises(BadRequest, match="16 images") as refused:
        fetched(*[f"{url}/none"] * 17, may_reach=anywhere)
    assert refused.value.param == "messages[0].content[17].image_url.url"


class Full:
    """Has no seat for anyone, and remembers who came."""

    seen: Exchange | None = None

    def admit(self, exchange: Exchange) -> Any:
        self.seen = exchange
        raise Overloaded("no seat")


@pytest.mark.parametrize("allowed", [True, False])
def test_a_node_fetches_where_it_may_and_before_the_request_has_a_seat(url: str, allowed: bool) -> None:
    models: Any = Full()
    guard: Any = SimpleNamespace(has_token=False, check_host=lambda host: None)
    nobody: Any = None

    async def scenario() -> None:
        with fetching(may_reach=anywhere) as fetcher:
            director = NodeDirector(guard, nobody, nobody, stall_s=1, images=fetcher if allowed else None)
            director.models = models
            route = director.route(exchange(asking(f"{url}/picture")))
            assert inspect.isawaitable(route)
            await route

    with pytest.raises(Overloaded):
        run(scenario())
    assert models.seen is not None
    assert (b"data:image/png;base64," in models.seen.body) is allowed


def test_bodies_that_name_none_are_left_as_they_are() -> None:
    with fetching() as fetcher:
        assert not fetcher.wants(b'{"messages":[{"role":"user","content":"http://x"}]}')
        for body in (b"{", b"[]", b'{"image_url":"http"}', asking("data:image/png;base64,AA")):
            assert run(fetcher.into(body)) == body


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # the cloud's own figures
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_only_public_addresses_are_reached(address: str, public: bool) -> None:
    assert is_public(address) is public
