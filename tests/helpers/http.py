"""A small HTTP client for tests: one connection a request, answers whole or as they come, nothing retried or hidden."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from helexa.core.sse import EventReader


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Streamed:
    """An answer on its way."""

    def __init__(self, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self._response = response

    def reads(self) -> Iterator[bytes]:
        """Decoded bytes as they come. Raises http.client.IncompleteRead where the other end cut it."""
        while data := self._response.read1(65536):
            yield data

    def events(self) -> Iterator[Any]:
        """The data of each event, decoded; "[DONE]" as it is. Comments are passed over."""
        reader = EventReader()
        for data in self.reads():
            for event in reader.feed(data):
                if not event.comment:
                    yield "[DONE]" if event.data == b"[DONE]" else json.loads(event.data)


class Http:
    """base: "http://host:port"."""

    def __init__(self, base: str, *, timeout_s: float = 30.0) -> None:
        parts = urlsplit(base)
        self._address = (parts.hostname or "", parts.port or 80)
        self._timeout_s = timeout_s

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, json: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
        return self.request("POST", path, json=json, headers=headers)

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        with self.stream(method, path, json=json, body=body, headers=headers, timeout_s=timeout_s) as streamed:
            return Reply(streamed.status, streamed.headers, b"".join(streamed.reads()))

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Streamed]:
        """Leaving the block hangs up."""
        sent = dict(headers or {})
        if json is not None:
            body = _encoded(json)
            sent.setdefault("content-type", "application/json")
        connection = HTTPConnection(*self._address, timeout=timeout_s or self._timeout_s)
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            try:
                yield Streamed(response)
            finally:
                response.close()
        finally:
            connection.close()


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode()
