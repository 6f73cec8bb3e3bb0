"""The command line's way to a gateway: requests and streams, with errors that a person can act on."""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Self

import msgspec

from helexa.core import sse
from helexa.core.relay.upstream import Upstream
from helexa.cortex.refusals import code_and_message

DEFAULT_URL: Final = "http://127.0.0.1:31313"


class CommandFailed(Exception):
    """A command could not do its work; str() is the one line for stderr. code: the process's exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Refused(CommandFailed):
    """The gateway answered with an error; `error_code` is that error's own."""

    def __init__(self, message: str, error_code: str | None) -> None:
        super().__init__(message)
        self.error_code = error_code


class Client:
    """One gateway, for one event loop. Use as an async context."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if "://" not in self.url:
            self.url = f"http://{self.url}"
        try:
            self._gateway = Upstream("gateway", self.url)
        except ValueError as err:
            raise CommandFailed(f"--gateway {url}: {err}", 2) from err

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._gateway.close()

    async def get(self, path: str, *, timeout_s: float = 10.0) -> Any:
        return await self._fetch("GET", path, None, timeout_s)

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = 10.0) -> Any:
        return await self._fetch("POST", path, msgspec.json.encode(body), timeout_s)

    @asynccontextmanager
    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[sse.Event]]:
        """The events of a streamed answer, comments included. Leaving the block early cancels the generation."""
        try:
            async with self._gateway.stream("POST", path, msgspec.json.encode(body), head_timeout_s=None) as answer:
                if answer.status >= 400:
                    data = b"".join([part async for part in answer])
                    raise self._refused("POST", path, answer.status, data)
                yield _events(answer)
        except OSError as err:  # TimeoutError is one
            raise self._unreachable(err) from err

    async def _fetch(self, method: str, path: str, body: bytes | None, timeout_s: float | None) -> Any:
        try:
            answer = await self._gateway.fetch(method, path, body, timeout_s=timeout_s)
        except OSError as err:
            raise self._unreachable(err) from err
        if answer.status >= 400:
            raise self._refused(method, path, answer.status, answer.body)
        try:
            return answer.json()
        except (msgspec.MsgspecError, ValueError, RecursionError) as err:
            raise CommandFailed(f"{self.url} is no cortex gateway: {path} is not JSON") from err

    def _unreachable(self, err: OSError) -> CommandFailed:
        return CommandFailed(
            f"no gateway at {self.url} ({why_unreachable(err)}). Start one with `cortex up` or `cortex serve`, or name "
            f"another with --gateway URL or CORTEX_URL."
        )

    def _refused(self, method: str, path: str, status: int, body: bytes) -> CommandFailed:
        code, message = code_and_message(body)
        if not message:
            return Refused(f"{self.url} answered {status} to {method} {path}; is that a cortex gateway?", code)
        return Refused(message, code)


def why_unreachable(err: OSError) -> str:
    """ "connection refused": asyncio's own words name its call, not the reason."""
    if isinstance(err, TimeoutError):
        return "no answer in time"
    return (os.strerror(err.errno) if err.errno else str(err) or type(err).__name__).lower()


async def _events(parts: AsyncIterable[bytes]) -> AsyncIterator[sse.Event]:
    reader = sse.EventReader()
    async for part in parts:
        for event in reader.feed(part):
            yield event
