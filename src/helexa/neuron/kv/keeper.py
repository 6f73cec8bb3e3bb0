"""Keeps the prompt cache of one loaded model: restored after its load, saved while it is idle and before it goes.

Lives as long as the model's host does. All calls come from the daemon's loop; files are read and written in threads,
or by the engine. Nothing here may fail a load or an unload: the worst that comes of it is a prefill.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from helexa.core import logs
from helexa.core.relay.upstream import Upstream
from helexa.neuron.harness.base import CacheFailed, Plan, PromptCache, Saved, SlotUse
from helexa.neuron.kv.states import State, Version, key_of, settled_s, unsaved
from helexa.neuron.kv.store import MB, KvStore
from helexa.neuron.tasks import owned

_log = logs.get("neuron.kv")

# What a first answer may wait for the caches of others. Their files are verified while the engine loads, and 78 MB
# (3,400 tokens of SmolLM2) took it 12 ms to read.
RESTORE_S: Final = 1.0
WRITE_S: Final = 120.0  # for it to write one state

_Failure = (CacheFailed, OSError, TimeoutError, ValueError)


class Keeper:
    def __init__(self, store: KvStore, cache: PromptCache, plan: Plan, engine: Upstream) -> None:
        self._store = store
        self._cache = cache
        self._engine = engine
        self._model_id = plan.request.id
        self._slots = plan.slots
        files = plan.files
        self._files: list[str] = []
        self._paths = [p for p in (*files.files, files.projector, files.draft, *files.lora) if p is not None]
        kv_mb = sum(device.kv_mb for device in plan.estimate.devices)
        self._token_bytes = max(1.0, kv_mb * MB / max(1, plan.context * plan.slots))  # better known after a save
        self._key = ""
        self._stamps: dict[int, int | None] = {}  # by slot, of what was saved
        self._clean_at = 0.0  # last_used at which nothing was left to save
        self._look_at = 0.0  # not before
        self._turn = asyncio.Lock()
        self._found: asyncio.Task[list[tuple[State, asyncio.Task[bool]]]] = owned(self._find())
        self._ahead: asyncio.Task[None] | None = None

    # restoring

    async def _find(self) -> list[tuple[State, asyncio.Task[bool]]]:
        """Begun with the load, so that looking at the files takes none of the first answer's time."""
        versions, self._files = await asyncio.to_thread(_look_at, self._paths)
        self._key = key_of(versions, self._cache.fingerprint)
        found = await asyncio.to_thread(self._store.find, self._key, self._model_id)
        return [(state, owned(asyncio.to_thread(self._store.is_sound, state))) for state in found]

    async def restore(self) -> None:
        """Into the first slots: whoever comes with another prompt is given the last of those that are free."""
        deadline = time.monotonic() + RESTORE_S
        started = time.monotonic()
        index = tokens = 0
        try:
            async with asyncio.timeout(RESTORE_S):
                found = await asyncio.shield(self._found)
        except (OSError, TimeoutError) as err:
            self._store.failed(str(err) or "the folder is too slow to look at")
            return
        for state, sound in found:
            await asyncio.wait({sound}, timeout=max(0.0, deadline - time.monotonic()))
            if not sound.done() or time.monotonic() > deadline:
                break  # it stays on disk, for the next time
            if sound.result() and await self._restored(state, index):
                index += 1
                tokens += state.tokens
            else:
                with suppress(OSError):  # a disk that takes no change: the next load drops it, or is slower for it
                    await asyncio.to_thread(self._store.drop, state)
        if index:
            self._store.restored += index
            took = round((time.monotonic() - started) * 1000, 1)
            _log.info("prompt cache restored", model=self._model_id, states=index, tokens=tokens, ms=took)

    async def _restored(self, state: State, index: int) -> bool:
        try:
            await self._cache.restore(self._engine, index, self._store.path_of(state))
        except _Failure as err:
            _log.warning("a saved prompt cache was not taken, and is dropped", model=self._model_id, reason=str(err))
            return False
        return True

    # saving

    def look(self, *, active: int, last_used: float) -> None:
        """Once a second. Writes ahead of an unload what has settled, so that a swap need not wait for it."""
        now = time.monotonic()
        if active or last_used == self._clean_at or now - last_used < settled_s(0) or now < self._look_at:
            return
        if self._ahead is None or self._ahead.done():
            self._ahead = owned(self._save(last_used, settled=True))

    async def save(self, last_used: float) -> None:
        """All that is worth it and not on disk yet. The model is idle, and nobody is admitted any more."""
        await self._save(last_used, settled=False)

    def close(self) -> None:
        """The host goes: what is under way is given up."""
        self._found.cancel()
        if self._ahead is not None:
            self._ahead.cancel()

    async def _save(self, last_used: float, *, settled: bool) -> None:
        async with self._turn:
            if last_used == self._clean_at or not last_used:
                return
            try:
                slots = await self._cache.slots(self._engine)
            except _Failure as err:
                self._store.failed(str(err))
                return
            todo = unsaved(slots, self._stamps)
            if settled:
                wait_s = settled_s(sum(slot.tokens for slot in todo) * self._token_bytes)
                if time.monotonic() - last_used < wait_s:
                    self._look_at = last_used + wait_s
                    return
            for slot in todo:
                await self._save_slot(slot, last_used)
            self._clean_at = last_used  # also what failed: it is tried again when it has grown

    async def _save_slot(self, slot: SlotUse, last_used: float) -> None:
        store = self._store
        part = await asyncio.to_thread(store.begin, slot.tokens * self._token_bytes)
        if part is None:
            return
        started = time.monotonic()
        used_at = time.time() - (started - last_used)
        try:
            async with asyncio.timeout(WRITE_S):
                saved = await self._cache.save(self._engine, slot.index, part)
            state = await asyncio.to_thread(store.commit, part, self._key, self._described(saved, used_at))
        except _Failure as err:
            store.failed(str(err) or type(err).__name__)
            return
        finally:
            part.unlink(missing_ok=True)
        self._stamps[slot.index] = slot.stamp
        self._token_bytes = state.size_bytes / max(1, saved.tokens)
        took = round((time.monotonic() - started) * 1000, 1)
        mb = round(state.size_bytes / 1e6, 1)
        _log.info("prompt cache saved", model=self._model_id, tokens=saved.tokens, mb=mb, ms=took)

    def _described(self, saved: Saved, used_at: float) -> Any:
        return lambda name, size_bytes, checksum: State(
            name=name,
            key=self._key,
            model_id=self._model_id,
            files=self._files,
            slots=self._slots,
            tokens=saved.tokens,
            blocks=list(saved.blocks),
            size_bytes=size_bytes,
            checksum=checksum,
            used_at=used_at,
        )


def _look_at(paths: list[Path]) -> tuple[list[Version], list[str]]:
    """Their versions, and every name that they have: in the Hub's cache a file is a link to a blob."""
    stats = [path.stat() for path in paths]
    names = {str(path) for path in paths} | {os.path.realpath(path) for path in paths}
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats], sorted(names)
