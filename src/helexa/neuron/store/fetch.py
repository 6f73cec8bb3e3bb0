"""Downloads as the loop sees them: each in a thread of its own, and one for all who want the same files."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from helexa.core.errors import HelexaError, ModelNotFound, PermissionDenied
from helexa.core.lifecycle import Progress
from helexa.neuron.store import http
from helexa.neuron.store.cache import HubCache
from helexa.neuron.store.download import Download
from helexa.neuron.store.hub import Hub, Listing
from helexa.neuron.store.names import HubRef

Report = Callable[[Progress], None]
# Which files of a repository make the model; None sends on to the next repository.
Choice = Callable[[HubRef, Listing], list[str] | None]

_END_WITHIN_S = 5.0  # a cancelled thread is waited for; only a connection attempt can hold it longer

T = TypeVar("T")


@dataclass(slots=True)
class _Shared:
    download: Download
    task: asyncio.Future[list[Path]]
    reports: list[Report] = field(default_factory=list)
    last: Progress | None = None


class Fetcher:
    """All running downloads of this process. Belongs to one loop."""

    def __init__(self, cache: HubCache) -> None:
        self._cache = cache
        self._running: dict[tuple[str, str, tuple[str, ...]], _Shared] = {}

    async def find(self, hub: Hub, ref: HubRef, repos: Sequence[str], choose: Choice) -> tuple[Listing, list[str]]:
        """The first of repos that has the model, asked one after another. ModelNotFound when none has."""
        cancel = http.Cancel()
        refusals: list[HelexaError] = []
        for repo in repos:
            try:
                listing = await in_thread(lambda repo=repo: hub.listing(repo, cancel), cancel.cancel)  # type: ignore[misc]
                wanted = choose(ref, listing)
            except (ModelNotFound, PermissionDenied) as err:
                if repo == ref.repo and err.param == "quant":  # it has GGUF files, and not this one
                    raise
                refusals.append(err)
                continue
            if wanted is not None:
                return listing, wanted
        # A gated model, a quant that only the others have, a misspelt name: the most telling of the refusals.
        telling = [e for e in refusals if isinstance(e, PermissionDenied) or e.param == "quant"]
        if telling or len(refusals) == len(repos):
            raise (telling or refusals)[0]
        what = f"GGUF file {ref.tag}" if ref.tag else "file that this node can serve"
        others = f", and there is none in {', '.join(repos[1:])}" if len(repos) > 1 else ""
        raise ModelNotFound(f"{ref.repo} has no {what}{others}")

    async def fetch(
        self, hub: Hub, listing: Listing, wanted: Sequence[str], report: Report, *, distrust: bool = False
    ) -> list[Path]:
        """Paths of the wanted files in the cache. A second call for the same joins the first; when the last of them is
        cancelled the download ends, and its part is kept."""
        key = (listing.repo, listing.commit, tuple(wanted))
        shared = self._running.get(key)
        if shared is None:
            shared = self._start(hub, listing, wanted, distrust)
            self._running[key] = shared
            shared.task.add_done_callback(lambda _: self._forget(key, shared))
        shared.reports.append(report)
        if shared.last is not None:
            report(shared.last)
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.reports.remove(report)
            if not shared.reports and not shared.task.done():
                self._forget(key, shared)  # who comes now starts anew, and waits for the lock on the file
                shared.download.cancel()
                await asyncio.wait({shared.task}, timeout=_END_WITHIN_S)

    def _start(self, hub: Hub, listing: Listing, wanted: Sequence[str], distrust: bool) -> _Shared:
        loop = asyncio.get_running_loop()

        def tell(progress: Progress) -> None:
            try:
                loop.call_soon_threadsafe(deliver, progress)
            except RuntimeError:
                pass  # the loop ended before the thread

        def deliver(progress: Progress) -> None:
            shared.last = progress
            for report in tuple(shared.reports):
                report(progress)

        files = [listing.file(name) for name in wanted]
        download = Download(hub, self._cache, listing, files, tell, distrust=distrust)
        shared = _Shared(download, asyncio.ensure_future(in_thread(download.run, download.cancel)))
        return shared

    def _forget(self, key: tuple[str, str, tuple[str, ...]], shared: _Shared) -> None:
        if self._running.get(key) is shared:
            del self._running[key]
        if shared.task.done() and not shared.task.cancelled():
            shared.task.exception()  # those who left do not ask for it


async def in_thread(work: Callable[[], T], cancel: Callable[[], None]) -> T:
    """Run blocking work in a daemon thread of its own: a download of an hour must not hold one of the few threads that
    the loop lends, nor the end of the program. When cancelled, `cancel` is called."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def body() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as err:
            error = err
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            pass  # the loop ended before us

    threading.Thread(target=body, name="helexa-store", daemon=True).start()
    try:
        return await future
    except asyncio.CancelledError:
        cancel()
        raise
