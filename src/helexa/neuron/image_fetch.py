"""Images that a chat names by their address, fetched into the request, where the operator allows it (`fetch_images`).

A caller chooses what is fetched, so nothing of the node's own network may be: every address that a name leads to has
to be a public one, at each redirect anew, and the connection goes to the address that was judged, by no proxy. What
comes has to be a picture, and bounded in size, time and number.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Final
from urllib.parse import SplitResult, urljoin, urlsplit

import msgspec

from helexa.core.bodies import NOT_JSON
from helexa.core.errors import BadRequest
from helexa.neuron.harness.splice import members, splice

MAX_BYTES: Final = 20 << 20  # OpenAI's bound for one image
MAX_IMAGES: Final = 16
MAX_TOGETHER: Final = 45 << 20  # of one request: as base64 they are the 60 MB that a body may have that brings its own
WITHIN_S: Final = 10.0  # for one image, redirects and its turn included
MAX_REDIRECTS: Final = 3
WORKERS: Final = 4

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_PORTS: Final = {"http": 80, "https": 443}
# Public by their own range, and yet another network's addresses within: 6to4 and NAT64.
_TUNNELS: Final = (ip_network("2002::/16"), ip_network("64:ff9b::/96"), ip_network("64:ff9b:1::/48"))
_PICTURES: Final = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
)


class _Refused(Exception):
    """Why an image was not fetched, as the end of "`place` ..."."""


def is_public(address: str) -> bool:
    """Nobody's own network, nor this machine."""
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in tunnel for tunnel in _TUNNELS):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


@dataclass(frozen=True, slots=True)
class _Place:
    where: str
    part: dict[str, Any]


class ImageFetcher:
    """Owned by the daemon's loop. may_reach: of an address that a name leads to."""

    def __init__(self, may_reach: Callable[[str], bool] = is_public) -> None:
        self._may_reach = may_reach
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="image")
        self._turn = asyncio.Semaphore(WORKERS)  # requests whose images are in memory before they have a seat

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def wants(self, body: bytes) -> bool:
        """HOT, once per chat: may this body name an image elsewhere?"""
        return b'"image_url"' in body and b"http" in body

    async def into(self, body: bytes) -> bytes:
        """The body with each image in it. Raises BadRequest, naming the place."""
        raw = next((body[start:end] for key, start, end in reversed(list(members(body))) if key == "messages"), b"")
        try:
            messages = msgspec.json.decode(raw)
        except NOT_JSON:
            return body  # the harness says what is wrong with it
        places = list(_places(messages))
        if not places:
            return body
        if len(places) > MAX_IMAGES:
            raise _bad(places[MAX_IMAGES].where, f"is one too many: {MAX_IMAGES} images of one request are fetched")
        together = 0
        async with self._turn:
            for place in places:
                url = place.part["image_url"]["url"]
                data = await self._image(place.where, url)
                together += len(data)
                if together > MAX_TOGETHER:
                    raise _bad(place.where, f"makes the request's images larger than {MAX_TOGETHER >> 20} MB together")
                kind = _kind(data)
                if kind is None:
                    raise _bad(place.where, f"leads to what is no picture: {url}")
                place.part["image_url"]["url"] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return splice(body, {"messages": msgspec.json.encode(messages)})

    async def _image(self, where: str, url: str) -> bytes:
        errand = _Errand(url, self._may_reach)
        try:
            async with asyncio.timeout(WITHIN_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, errand.run)
        except TimeoutError:
            raise _bad(where, f"did not come within {WITHIN_S:g} s: {url}") from None
        except _Refused as err:
            raise _bad(where, str(err)) from None
        finally:
            errand.cut()


class _Errand:
    """One image, in a thread of ours. A server that sends a byte now and then keeps within the time of every read: so
    the whole is ended from outside, by `cut`, also when the client leaves."""

    def __init__(self, url: str, may_reach: Callable[[str], bool]) -> None:
        self._url = url
        self._may_reach = may_reach
        self._sock: socket.socket | None = None
        self._cut = False

    def cut(self) -> None:
        """From any thread: `run` ends now. Idempotent."""
        self._cut = True
        sock = self._sock
        if sock is not None:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of the connection, whatever TLS has to say to it

    def run(self) -> bytes:
        """Raises _Refused."""
        url = self._url
        try:
            for _ in range(MAX_REDIRECTS + 1):
                target = urlsplit(url)
                connection = self._connect(target)
                try:
                    location, data = _get(connection, target)
                finally:
                    self._sock = None
                    connection.close()
                if location is None:
                    return data
                url = urljoin(url, location)
        except (OSError, http.client.HTTPException, ValueError) as err:
            raise _Refused(f"cannot be fetched: {url}: {err}") from None
        raise _Refused(f"is redirected more than {MAX_REDIRECTS} times: {url}")

    def _connect(self, target: SplitResult) -> http.client.HTTPConnection:
        host = target.hostname
        if target.scheme not in _PORTS or not host:
            raise _Refused(f"leads to {target.scheme}:, and only http: and https: are fetched")
        port = target.port or _PORTS[target.scheme]
        addresses = [str(row[4][0]) for row in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not addresses or not all(map(self._may_reach, addresses)):
            raise _Refused(f"leads to an address that is not public: {host}")
        sock = socket.create_connection((addresses[0], port), timeout=WITHIN_S)
        try:
            connection = http.client.HTTPConnection(host, port)
            if target.scheme == "https":
                connection = http.client.HTTPSConnection(host, port)
                context = ssl.create_default_context()
                sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            self._sock = sock
            if self._cut:
                raise OSError("it is not wanted any more")
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
        except BaseException:
            sock.close()
            raise
        connection.sock = sock  # to the address that was judged; the name is not looked up again
        return connection


def _get(connection: http.client.HTTPConnection, target: SplitResult) -> tuple[str | None, bytes]:
    """(where it is redirected to, or None; the body)."""
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    connection.request("GET", path, headers={"Accept": "image/*", "Connection": "close"})
    with closing(connection.getresponse()) as answer:
        location = answer.headers.get("Location")
        if answer.status in _REDIRECTS and location:
            return location, b""
        if answer.status != 200:
            raise _Refused(f"cannot be fetched: {target.geturl()} answers {answer.status}")
        data = bytearray()
        while part := answer.read1(1 << 16):
            data += part
            if len(data) > MAX_BYTES:
                raise _Refused(f"is larger than {MAX_BYTES >> 20} MB: {target.geturl()}")
        if answer.length:
            raise http.client.IncompleteRead(bytes(data), answer.length)
        return None, bytes(data)


def _places(messages: Any) -> Iterator[_Place]:
    """The parts that name an image by an http(s) address."""
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            image = part.get("image_url") if isinstance(part, dict) else None
            url = image.get("url") if isinstance(image, dict) else None
            if isinstance(url, str) and url[:8].lower().startswith(("http://", "https://")):
                yield _Place(f"messages[{i}].content[{j}].image_url.url", part)


def _kind(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((kind for begin, kind in _PICTURES if data.startswith(begin)), None)


def _bad(param: str, what: str) -> BadRequest:
    return BadRequest(f"`{param}` {what}.", param=param)
