"""A small blocking HTTP client for the Hub: redirects, proxies, ranges, and a cancel that takes effect at once.

Not huggingface_hub: its 2.x deletes a partial file when the download ends early, checks no hash, cannot be cancelled,
and costs the daemon 22 MB. Not urllib.request: it takes the Authorization header along to another host.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final
from urllib.parse import urljoin, urlsplit

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS: Final = 6
CONNECT_TIMEOUT_S: Final = 10.0
READ_TIMEOUT_S: Final = 30.0


class Cancelled(Exception):
    """The one who wanted it wants it no more."""


class Unreachable(Exception):
    """No connection could be made: no network, no such host, nobody listens."""


class Broken(Exception):
    """The connection was made and broke, or stalled. Trying again is right."""


class Cancel:
    """Ends a download from another thread: wakes its waits and shuts its socket."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def cancel(self) -> None:
        self._event.set()
        with self._lock:
            if self._socket is not None:
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it ended by itself

    def check(self) -> None:
        if self._event.is_set():
            raise Cancelled

    def wait(self, seconds: float) -> bool:
        """Sleep, unless cancelled: then Cancelled."""
        if self._event.wait(seconds):
            raise Cancelled
        return True

    def watch_none(self) -> None:
        with self._lock:
            self._socket = None

    def watch(self, sock: socket.socket) -> None:
        """The socket that `cancel` is to shut."""
        with self._lock:
            self._socket = sock
        self.check()


class Response:
    """An answer whose body is still to be read. Use it in a `with`."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, cancel: Cancel):
        self.status = response.status
        self.headers = response.headers
        self._connection = connection
        self._response = response
        self._cancel = cancel

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *exc: object) -> None:
        self._cancel.watch_none()
        self._connection.close()

    def read_some(self, limit: int) -> bytes:
        """What is there, at least a byte; b"" at the end, which a broken connection may bring early."""
        with _as_broken(self._connection.host, self._cancel):
            return self._response.read1(limit)

    def read(self, limit: int) -> bytes:
        with _as_broken(self._connection.host, self._cancel):
            return self._response.read(limit)


def get(url: str, headers: Mapping[str, str], cancel: Cancel) -> Response:
    """GET, following redirects; `Authorization` stays with the first host (presigned addresses refuse a second one).

    Raises Unreachable, Broken or Cancelled; any status is an answer.
    """
    origin = urlsplit(url)
    for _ in range(_MAX_REDIRECTS):
        target = urlsplit(url)
        same = (target.scheme, target.netloc) == (origin.scheme, origin.netloc)
        connection = _connect(url)
        try:
            with _as_broken(connection.host, cancel):
                cancel.watch(connection.sock)
                mine = {k: v for k, v in headers.items() if same or k != "Authorization"}
                connection.request("GET", _path(url), headers=mine)
                answer = connection.getresponse()
        except BaseException:
            cancel.watch_none()
            connection.close()
            raise
        location = answer.headers.get("Location")
        response = Response(connection, answer, cancel)
        if answer.status not in _REDIRECTS or not location:
            return response
        response.__exit__()
        url = urljoin(url, location)
        if target.scheme == "https" and urlsplit(url).scheme != "https":
            raise Broken(f"{target.hostname} redirects to an unencrypted address")
    raise Broken(f"{origin.hostname} redirects in a circle")


@contextmanager
def _as_broken(host: str, cancel: Cancel) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as err:
        cancel.check()  # it broke because we shut it
        raise Broken(f"{host}: {_reason(err)}") from err


def _connect(url: str) -> http.client.HTTPConnection:
    target = urlsplit(url)
    host = target.hostname or ""
    proxy = _proxy(target.scheme, target.netloc)
    try:
        if target.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                proxy or host, None if proxy else target.port, timeout=CONNECT_TIMEOUT_S, context=_tls()
            )
            if proxy:
                connection.set_tunnel(host, target.port or 443)
        else:
            connection = http.client.HTTPConnection(
                proxy or host, None if proxy else target.port, timeout=CONNECT_TIMEOUT_S
            )
        connection.connect()
    except ssl.SSLCertVerificationError as err:
        raise Unreachable(f"the certificate of {host} is not trusted: {err.verify_message}") from err
    except (OSError, http.client.HTTPException, ValueError) as err:
        raise Unreachable(f"{proxy or target.netloc}: {_reason(err)}") from err
    connection.sock.settimeout(READ_TIMEOUT_S)
    return connection


def _path(url: str) -> str:
    target = urlsplit(url)
    if target.scheme == "http" and _proxy("http", target.netloc):
        return url  # a plain proxy wants the whole address
    return target.path + (f"?{target.query}" if target.query else "") or "/"


def _proxy(scheme: str, netloc: str) -> str | None:
    """host:port from HTTPS_PROXY and its kin, unless NO_PROXY names the host."""
    address = urllib.request.getproxies().get(scheme)
    if not address or urllib.request.proxy_bypass(netloc):
        return None
    return urlsplit(address if "//" in address else f"//{address}").netloc.rpartition("@")[2]


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:  # a slim container without ca-certificates
        try:
            import certifi
        except ImportError:
            return context
        context.load_verify_locations(certifi.where())
    return context


def _reason(err: Exception) -> str:
    if isinstance(err, socket.gaierror):
        return "its name cannot be resolved"
    if isinstance(err, TimeoutError):
        return "no answer in time"
    return getattr(err, "strerror", None) or str(err) or type(err).__name__
