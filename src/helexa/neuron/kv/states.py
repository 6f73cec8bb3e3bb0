"""Saved prompt caches: which are worth writing, which match a load, which have to go. Pure: no clock, no disk.

A state is what one slot held: the tokens of a conversation with their keys and values. It is of use to one thing only:
the same files, engine and settings, which is what its `key` stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec
import xxhash

from helexa.neuron.harness.base import CACHE_BLOCK, SlotUse

# A prompt this short is computed as fast as anybody notices: 256 tokens took SmolLM2 1.0 s on two cores, and take a
# GPU that computes 3,000 a second 85 ms. In time alone every state pays: 64 tokens came back in 3 ms, not 248.
WORTH_TOKENS: Final = CACHE_BLOCK
# Nobody's turn ends and begins again within this; and with the second, what goes to disk in the long run stays under
# 20 MB/s for each model, however long its conversations are.
SETTLE_S: Final = 3.0
WEAR_BYTES_S: Final = 20e6

Version = tuple[int, int]  # of a file: its size, and when it was changed, in ns


class State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands beside a saved state on disk. It is whole when this is there, and only then."""

    name: str  # of its file
    key: str
    model_id: str
    files: list[str]  # of the model
    slots: int  # that the model has
    tokens: int
    blocks: list[str]  # a hash for each CACHE_BLOCK tokens and all before them
    size_bytes: int
    checksum: str
    used_at: float  # Unix time of the last request that used it


def key_of(versions: Sequence[Version], fingerprint: str) -> str:
    """versions: of every file that the model is loaded from, in order; fingerprint: PromptCache.fingerprint."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode([list(versions), fingerprint]))


def unsaved(slots: Iterable[SlotUse], stamps: Mapping[int, int | None]) -> list[SlotUse]:
    """Slots whose content is worth keeping and not on disk yet, the last used first.

    stamps: by slot, the stamp of what was saved of it. A slot without a stamp holds nothing, or what was restored.
    """
    worth = [
        slot
        for slot in slots
        if slot.stamp is not None and slot.tokens >= WORTH_TOKENS and stamps.get(slot.index) != slot.stamp
    ]
    return sorted(worth, key=lambda slot: slot.stamp or 0, reverse=True)


def settled_s(size_bytes: float) -> float:
    """How long a model must have been idle before so much is written ahead of its unloading."""
    return SETTLE_S + size_bytes / WEAR_BYTES_S


def matching(states: Iterable[State], key: str) -> list[State]:
    """What to restore into the slots of a model, the last used first."""
    found = sorted((s for s in states if s.key == key), key=lambda s: s.used_at, reverse=True)
    return found[: found[0].slots] if found else []


def outdated(states: Iterable[State], key: str, model_id: str) -> list[State]:
    """Of this model as it was before: other files, another engine, other settings."""
    return [s for s in states if s.model_id == model_id and s.key != key]


def continues(new: State, old: State) -> bool:
    """Whether `new` begins with all that `old` holds, but for less than a block of it."""
    return new.key == old.key and bool(old.blocks) and new.blocks[: len(old.blocks)] == old.blocks


def surplus(states: Iterable[State], *, now: float, limit_bytes: int, max_age_s: float) -> list[State]:
    """What has to go. 1. what is too old, or larger than all may be; 2. what a later one continues; 3. more of a model
    than it has slots; 4. the least recently used, until the rest is within the limit."""
    gone: list[State] = []
    kept: list[State] = []
    size = 0
    full = False
    for state in sorted(states, key=lambda s: s.used_at, reverse=True):
        same = [other for other in kept if other.key == state.key]
        if (
            now - state.used_at > max_age_s  # 1
            or state.size_bytes > limit_bytes
            or any(continues(other, state) for other in same)  # 2
            or len(same) >= state.slots  # 3
        ):
            gone.append(state)
            continue
        full = full or size + state.size_bytes > limit_bytes  # 4
        if full:
            gone.append(state)
        else:
            kept.append(state)
            size += state.size_bytes
    return gone
