"""What a prompt begins with, and which replica has seen that: hashes of a prompt's prefixes, and who holds them. Pure.

A hash stands for everything from the prompt's beginning to a mark: tools and system come first, as templates render
them, then message by message. Marks are at the ends of messages and every 4 kB inside long ones, never nearer to each
other than 256 bytes. Where a mark is depends on what comes before it alone, so that a conversation that grows keeps
its marks. Bodies are hashed and not decoded, and only their prompt: clients put other fields wherever they like.

Sizes are weights: bytes of JSON, an image counted as what it comes to in tokens rather than as base64.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Final, Generic, TypeVar

import msgspec
import xxhash

from helexa.core.bodies import NOT_JSON

STEP: Final = 4096  # bytes between marks inside a long message: about a thousand tokens
APART: Final = 256
SESSIONS: Final = 10_000  # remembered of a model
# What is larger is not looked into (images, mostly; so many messages are nonsense): its session may know it.
_MOST_BYTES: Final = 2 << 20
_MOST_PARTS: Final = 10_000
_LARGE_WEIGHT: Final = 32_768.0
_IMAGE: Final = b";base64,"
_IMAGE_WEIGHT: Final = 4096


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """hashes, ends: of the marks, the shortest prefix first; `ends` is the weight up to there. weight: of the whole.
    session: what the client calls the conversation, where it does."""

    hashes: Sequence[int]
    ends: Sequence[float]
    weight: float
    session: str | None = None


class _Chat(msgspec.Struct, gc=False):
    """The fields of a body that make its prompt, whatever its dialect."""

    messages: list[msgspec.Raw] = []
    tools: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    prompt_cache_key: str | None = None


_decode = msgspec.json.Decoder(_Chat).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def read(body: bytes, model: str, session: str | None = None) -> Prompt | None:
    """HOT, once for a request to a model with several replicas: 15 us for 8,000 tokens. Bench: bench/fleet cost.

    None for a body without a prompt, or one that is not what its dialect says: that is the node's to refuse.
    """
    if len(body) > _MOST_BYTES:
        return Prompt((), (), _LARGE_WEIGHT, session)
    try:
        chat = _decode(body)
        parts = chat.messages or _items(chat.input) or _text(chat.prompt)
    except NOT_JSON:
        return None
    if not parts:
        return None
    if len(parts) > _MOST_PARTS:
        return Prompt((), (), _LARGE_WEIGHT, session)
    hashed = xxhash.xxh3_64(model.encode("utf-8", "surrogatepass"))
    update, digest = hashed.update, hashed.intdigest
    weight, mark = 0.0, 0.0
    hashes: list[int] = []
    ends: list[float] = []
    for first in (chat.tools, chat.system, chat.instructions):
        if first:
            update(first)
            weight += len(memoryview(first))
        update(b"\n")  # what is a tool there is none here
    if weight >= APART:
        hashes.append(digest())
        ends.append(weight)
        mark = weight
    for part in parts:
        view = memoryview(part)
        size = len(view)
        if size <= STEP:
            update(view)
            weight += size
        elif _IMAGE in (raw := bytes(view)):
            update(view)
            weight += min(size, _IMAGE_WEIGHT * raw.count(_IMAGE))
        else:
            for at in range(0, size - STEP, STEP):
                update(view[at : at + STEP])
                hashes.append(digest())
                weight += STEP
                ends.append(weight)
                mark = weight
            rest = view[at + STEP :]
            update(rest)
            weight += len(rest)
        if weight - mark >= APART:
            hashes.append(digest())
            ends.append(weight)
            mark = weight
    return Prompt(hashes, ends, weight, session or chat.prompt_cache_key)


def _items(raw: msgspec.Raw) -> Sequence[bytes | msgspec.Raw]:
    """Of what may be a string or a list of items."""
    return _decode_list(raw) if bytes(raw).startswith(b"[") else _text(raw)


def _text(raw: msgspec.Raw) -> Sequence[bytes]:
    """A string, or token ids. The quote or bracket that ends it is no part of a longer one's beginning."""
    text = bytes(raw)
    return [text[:-1]] if text[:1] in (b'"', b"[") else []


H = TypeVar("H", bound=Hashable)


class Prefixes(Generic[H]):
    """Who holds which prefix of one model's prompts; for each holder a bounded LRU, as its engine has one.

    Of the mix of bench/fleet a bound that is five or eighty times the engine's own computes 2 to 8 % more tokens than a
    true one, one that is a quarter of it 2.8 times as many. So bounds err to the large side.
    """

    def __init__(self) -> None:
        self._held: dict[H, OrderedDict[int, float]] = {}  # holder -> hash -> its share; the next to go first
        self._size: dict[H, float] = {}
        self._where: dict[int, set[H]] = {}
        self._sessions: OrderedDict[str, tuple[H, float]] = OrderedDict()

    def match(self, prompt: Prompt, count: int) -> dict[H, float]:
        """HOT. Of each holder, how much of the prompt it holds, the greatest first. count: how many there may be."""
        found: dict[H, float] = {}
        where = self._where
        hashes, ends = prompt.hashes, prompt.ends
        known = 0
        for at in range(len(hashes) - 1, -1, -1):
            holders = where.get(hashes[at])
            # Who holds a prefix holds its beginning too, so that a longer list means somebody new.
            if holders is not None and len(holders) > known:
                end = ends[at]
                for holder in holders:
                    if holder not in found:
                        found[holder] = end
                known = len(found)
                if known >= count:
                    break
        return found

    def last_of(self, prompt: Prompt) -> tuple[H, float] | None:
        """Where the prompt's session was last, and with how much of a prompt."""
        return self._sessions.get(prompt.session) if prompt.session is not None else None

    def note(self, holder: H, prompt: Prompt, bound: float) -> None:
        """HOT. The prompt goes there. bound: what the holder can keep, in weight."""
        if prompt.session is not None:
            sessions = self._sessions
            sessions[prompt.session] = (holder, prompt.weight)
            sessions.move_to_end(prompt.session)
            if len(sessions) > SESSIONS:
                sessions.popitem(last=False)
        held = self._held.get(holder)
        if held is None:
            held = self._held[holder] = OrderedDict()
            self._size[holder] = 0.0
        hashes, ends = prompt.hashes, prompt.ends
        where = self._where
        size = self._size[holder]
        # The end first and the beginning last: of one conversation the end is forgotten first.
        for at in range(len(hashes) - 1, -1, -1):
            hashed = hashes[at]
            if hashed in held:
                held.move_to_end(hashed)
                continue
            share = ends[at] - ends[at - 1] if at else ends[0]
            held[hashed] = share
            size += share
            holders = where.get(hashed)
            if holders is None:
                where[hashed] = {holder}
            else:
                holders.add(holder)
        while size > bound and len(held) > 1:
            hashed, share = held.popitem(last=False)
            size -= share
            self._drop(hashed, holder)
        self._size[holder] = size

    def forget(self, holder: H) -> None:
        """Its engine is gone, and what it had seen with it."""
        for hashed in self._held.pop(holder, ()):
            self._drop(hashed, holder)
        self._size.pop(holder, None)
        for session in [name for name, (last, _) in self._sessions.items() if last is holder]:
            del self._sessions[session]

    def keep_only(self, holders: Collection[H]) -> list[H]:
        """All others are forgotten, and named."""
        gone = [holder for holder in self._held if holder not in holders]
        for holder in gone:
            self.forget(holder)
        return gone

    def _drop(self, hashed: int, holder: H) -> None:
        holders = self._where[hashed]
        holders.discard(holder)
        if not holders:
            del self._where[hashed]

    @property
    def sizes(self) -> Mapping[H, float]:
        """What is remembered of each holder, in weight."""
        return self._size
