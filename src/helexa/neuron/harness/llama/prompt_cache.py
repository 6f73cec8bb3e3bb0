"""The slots of a llama.cpp server: what they hold, written to files and read back.

A file is the engine's own: "ggsq", a version, the number of tokens and the tokens, then the cache, and last, of models
whose cache cannot be cut back, the checkpoints that a prompt which parts from it goes back to.
"""

from __future__ import annotations

import asyncio
import os
import struct
from array import array
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from helexa.core.relay.upstream import Answer, Upstream
from helexa.neuron.harness.base import CACHE_BLOCK, CacheFailed, Plan, Saved, SlotUse

HEAD: Final = struct.Struct("<4s5I")  # magic, version, how many integers follow; of those, the first three
MAGIC: Final = b"qsgg"  # LLAMA_STATE_SEQ_MAGIC in the order of a little-endian machine
PACKED: Final = (0xFFFFFFFF, 1)  # how the server's own list of tokens begins: a mark, its version, their number
MOST_TOKENS: Final = 1 << 24
# The options that a state depends on. Threads and batches change what is computed in which order, not what it means;
# how layers are dealt out over devices depends on what was free, and the state is the same.
MATTERS: Final = (
    "n_ctx",
    "slots",
    "kv_type",
    "kv_unified",
    "flash_attention",
    "gpu_layers",
    "split",
    "checkpoints",
)
ANSWER_S: Final = 5.0


def can_save(plan: Plan) -> bool:
    """What generates, from text alone: the engine saves neither images nor what a draft model holds."""
    return plan.facts.task in ("chat", "completion") and plan.files.projector is None and plan.files.draft is None


class _Slot(msgspec.Struct):
    """One of GET /slots."""

    id: int
    n_prompt_tokens: int = 0
    id_task: int | None = None


class _Written(msgspec.Struct):
    """The answer to a save."""

    n_saved: int
    n_written: int


class LlamaPromptCache:
    """harness.base.PromptCache."""

    def __init__(self, plan: Plan, engine_version: str | None) -> None:
        options = [plan.extra[name] for name in MATTERS]
        self.fingerprint = msgspec.json.encode(["llama", engine_version, *options]).decode()

    async def slots(self, engine: Upstream) -> list[SlotUse]:
        answer = await engine.fetch("GET", "/slots", timeout_s=ANSWER_S)
        if answer.status != 200:
            raise CacheFailed(f"the engine does not tell its slots: {answer.status}")
        slots: list[_Slot] = answer.json(list[_Slot])
        return [SlotUse(slot.id, slot.n_prompt_tokens, slot.id_task) for slot in slots]

    async def save(self, engine: Upstream, slot: int, file: Path) -> Saved:
        written: _Written = (await self._act(engine, slot, "save", file)).json(_Written)
        blocks = await asyncio.to_thread(blocks_of, file, written.n_saved, at_least_bytes=written.n_written)
        return Saved(written.n_saved, blocks)

    async def restore(self, engine: Upstream, slot: int, file: Path) -> None:
        await self._act(engine, slot, "restore", file)

    async def _act(self, engine: Upstream, slot: int, action: str, file: Path) -> Answer:
        order = msgspec.json.encode({"filename": file.name})
        answer = await engine.fetch("POST", f"/slots/{slot}?action={action}", order, timeout_s=None)
        if answer.status != 200:
            raise CacheFailed(f"the engine cannot {action} a slot: {answer.body[:300].decode(errors='replace')}")
        return answer


def blocks_of(file: Path, tokens: int, *, at_least_bytes: int = 0) -> tuple[str, ...]:
    """Of a saved state; empty where it does not begin as we know it: another version of the engine. CacheFailed where
    it is shorter than the engine says, which does not look at how its last write ended."""
    with file.open("rb") as opened:
        if os.fstat(opened.fileno()).st_size < at_least_bytes:
            raise CacheFailed("the engine wrote less than it says: is the disk full?")
        head = opened.read(HEAD.size)
        if len(head) < HEAD.size:
            raise CacheFailed(f"{file.name} holds no state")
        magic, _, count, *packed, held = HEAD.unpack(head)
        if magic != MAGIC or tuple(packed) != PACKED or held != tokens or not held < count <= MOST_TOKENS:
            return ()
        ids = array("i", opened.read(4 * held))
    digest = xxhash.xxh3_64()
    blocks = []
    for start in range(0, held - CACHE_BLOCK + 1, CACHE_BLOCK):
        digest.update(ids[start : start + CACHE_BLOCK].tobytes())
        blocks.append(digest.hexdigest())
    return tuple(blocks)
