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
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
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
WITHIN_S: Final = 10.0  # for one image, redirects included
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
        loop = asyncio.get_running_loop()
        for place in places:
            url = place.part["image_url"]["url"]
            try:
                data = await loop.run_in_executor(self._threads, self._fetch, url)
            except _Refused as err:
                raise _bad(place.where, str(err)) from None
            kind = _kind(data)
            if kind is None:
                raise _bad(place.where, f"leads to what is no picture: {url}")
            place.part["image_url"]["url"] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return splice(body, {"messages": msgspec.json.encode(messages)})

    def _fetch(self, url: str) -> bytes:
        """In a thread of ours."""
        until = time.monotonic() + WITHIN_S
        try:
            for _ in range(MAX_REDIRECTS + 1):
                target = urlsplit(url)
                connection = self._connect(target, until)
                try:
                    location, data = _get(connection, target, until)
                finally:
                    connection.close()
                if location is None:
                    return data
                url = urljoin(url, location)
        except TimeoutError:
            raise _Refused(f"did not come within {WITHIN_S:g} s: {url}") from None
        except (OSError, http.client.HTTPException, ValueError) as err:
            raise _Refused(f"cannot be fetched: {url}: {err}") from None
        raise _Refused(f"is redirected more than {MAX_REDIRECTS} times: {url}")

    def _connect(self, target: SplitResult, until: float) -> http.client.HTTPConnection:
        host = target.hostname
        if target.scheme not in _PORTS or not host:
            raise _Refused(f"leads to {target.scheme}:, and only http: and https: are fetched")
        port = target.port or _PORTS[target.scheme]
        addresses = [str(row[4][0]) for row in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not addresses or not all(map(self._may_reach, addresses)):
            raise _Refused(f"leads to an address that is not public: {host}")
        sock = socket.create_connection((addresses[0], port), timeout=_left(until))
        try:
            if target.scheme == "http":
                connection = http.client.HTTPConnection(host, port)
            else:
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
                connection = http.client.HTTPSConnection(host, port)
        except BaseException:
            sock.close()
            raise
        connection.sock = sock  # to the address that was judged; the name is not looked up again
        return connection


def _get(connection: http.client.HTTPConnection, target: SplitResult, until: float) -> tuple[str | None, bytes]:
    """(where it is redirected to, or None; the body)."""
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    sock = connection.sock  # http.client lets go of it where the answer ends with the connection
    connection.request("GET", path, headers={"Accept": "image/*", "Connection": "close"})
    with closing(connection.getresponse()) as answer:
        location = answer.headers.get("Location")
        if answer.status in _REDIRECTS and location:
            return location, b""
        if answer.status != 200:
            raise _Refused(f"cannot be fetched: {target.geturl()} answers {answer.status}")
        data = bytearray()
        while True:
            sock.settimeout(_left(until))
            part = answer.read1(1 << 16)
            if not part:
                return None, bytes(data)
            data += part
            if len(data) > MAX_BYTES:
                raise _Refused(f"is larger than {MAX_BYTES >> 20} MB: {target.geturl()}")


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


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _bad(param: str, what: str) -> BadRequest:
    return BadRequest(f"`{param}` {what}.", param=param)
