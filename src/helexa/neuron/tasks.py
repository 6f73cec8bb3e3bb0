"""Work that goes on when who asked for it leaves, and ends in order when it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def owned(work: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
    """A task whose outcome is looked at even when nobody waits for it any more."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def cancel_soon(work: asyncio.Task[Any]) -> None:
    """Once it has begun: a task that is cancelled before its first step never gets to clean up after itself."""
    asyncio.get_running_loop().call_soon(work.cancel)


async def surely(work: Coroutine[Any, Any, None]) -> None:
    """Wait for it to its end, and only then hear that one was cancelled meanwhile."""
    task = asyncio.get_running_loop().create_task(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    task.result()
