"""Responses that clients may come back to: kept in memory, bounded in bytes and age, never across owners.

A record holds what its request brought and what was answered; `previous_response_id` links it to the one before it.
Whoever continues a conversation keeps all of it alive. Owned by one loop; nothing here blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

import msgspec

from helexa.core.bodies import MAX_MESSAGES
from helexa.core.dialects import responses_wire as wire
from helexa.core.errors import NotFound, PreviousResponseNotFound, RequestTooLarge

ANONYMOUS = ""


@dataclass(frozen=True, slots=True)
class Record:
    """id:        of the response
    owner:     who may see it
    previous:  the id of the response that it continues
    input:     the request's own items, a JSON list
    response:  the object, JSON
    """

    id: str
    owner: str
    previous: str | None
    input: bytes
    response: bytes

    @property
    def size(self) -> int:
        return len(self.input) + len(self.response) + _OVERHEAD


_OVERHEAD = 600  # of a record's own objects, bytes


class CannotKeep(Exception):
    """Where responses are to be kept cannot be had; str() is the whole message for the user."""


class ResponseStore(Protocol):
    def put(self, record: Record) -> None: ...

    def get(self, owner: str, response_id: str) -> Record | None:
        """None for what is not there, or too old. Raises NotFound for what is another owner's."""

    def delete(self, owner: str, response_id: str) -> bool:
        """False where there was nothing. Raises NotFound as `get` does."""

    def close(self) -> None: ...


class MemoryStore:
    """max_bytes: what was not used for the longest time goes first.   age_s: since a record was used last.
    clock: seconds, never going back."""

    def __init__(self, *, max_bytes: int, age_s: float, clock: Callable[[], float]) -> None:
        self._max_bytes = max_bytes
        self._age_s = age_s
        self._clock = clock
        self._records: OrderedDict[str, tuple[Record, float]] = OrderedDict()  # the last used last
        self._bytes = 0

    def put(self, record: Record) -> None:
        self._drop(record.id)
        if record.size > self._max_bytes:
            return
        self._records[record.id] = record, self._clock()
        self._bytes += record.size
        self._expire()
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._records)))

    def get(self, owner: str, response_id: str) -> Record | None:
        self._expire()
        found = self._records.get(response_id)
        if found is None:
            return None
        record, _ = found
        if record.owner != owner:
            raise not_found("Response", response_id)
        self._records[response_id] = record, self._clock()
        self._records.move_to_end(response_id)
        return record

    def delete(self, owner: str, response_id: str) -> bool:
        if self.get(owner, response_id) is None:
            return False
        self._drop(response_id)
        return True

    def close(self) -> None:
        self._records.clear()
        self._bytes = 0

    def _expire(self) -> None:
        oldest = self._clock() - self._age_s
        while self._records:
            response_id, (_, used) = next(iter(self._records.items()))
            if used >= oldest:
                return
            self._drop(response_id)

    def _drop(self, response_id: str) -> None:
        found = self._records.pop(response_id, None)
        if found is not None:
            self._bytes -= found[0].size


def owner_of(credential: str | None) -> str:
    """Who asks, by what the request bears as a key, which is not kept itself; all who bear none are one."""
    if not credential:
        return ANONYMOUS
    return sha256(credential.removeprefix("Bearer ").strip().encode("latin-1", "replace")).hexdigest()


def not_found(what: str, its_id: str) -> NotFound:
    return NotFound(f"{what} with id '{its_id}' not found: it was not stored, was deleted, or is too old.")


# conversations

# Of all that one request continues: it is decoded on the loop, 0.1 s for so much, for a request of a few bytes.
MOST_BYTES: Final = 16 << 20


class _Answered(msgspec.Struct):
    status: str = "completed"
    output: list[wire.Item] = []


_answered = msgspec.json.Decoder(_Answered).decode
_items = msgspec.json.Decoder(list[wire.Item]).decode


def chain(store: ResponseStore, owner: str, response_id: str) -> Sequence[Record]:
    """The response and all that it continues, the first one first. Raises PreviousResponseNotFound for what is lost,
    NotFound for what is another owner's, RequestTooLarge for more than the loop can be held up with."""
    records = list(backwards(store, owner, response_id))
    lost = records[-1].previous if records else response_id
    if lost is not None:
        raise PreviousResponseNotFound(
            f"Previous response with id '{lost}' not found: it was not stored, was deleted, or is too old. Send the "
            "whole conversation as `input`.",
            param="previous_response_id",
        )
    return records[::-1]


def backwards(store: ResponseStore, owner: str, response_id: str) -> Iterator[Record]:
    """The response, the one that it continues, and so on, as far as they are kept. Raises as `chain` does."""
    number = size = 0
    at: str | None = response_id
    while at is not None and (record := store.get(owner, at)) is not None:
        number, size = number + 1, size + record.size
        if size > MOST_BYTES or number > MAX_MESSAGES:
            raise RequestTooLarge(
                f"What '{response_id}' continues is over {MOST_BYTES >> 20} MB or {MAX_MESSAGES:,} responses; begin "
                "anew with what of it is needed as `input`.",
                param="previous_response_id",
            )
        yield record
        at = record.previous


def conversation(records: Sequence[Record]) -> list[wire.Item]:
    """What was said, in order. A call that was cut off was never run, so that the model need not see it."""
    said: list[wire.Item] = []
    for record in records:
        answered = _answered(record.response)
        whole = answered.output
        if whole and answered.status != "completed" and whole[-1].type in ("function_call", "custom_tool_call"):
            whole = whole[:-1]
        said += [*_items(record.input), *whole]
    return said


class Items:
    """Items of an owner's responses, by id, for one request: each response is read once, however many of its items are
    asked for."""

    def __init__(self, store: ResponseStore, owner: str) -> None:
        self._store = store
        self._owner = owner
        self._read: dict[str, dict[str, wire.Item]] = {}  # by the id of the response

    def find(self, item_id: str) -> wire.Item | None:
        """The id bears its response's: msg_KEYo0, fco_KEYi2."""
        _, _, rest = item_id.partition("_")
        key = rest.rstrip("0123456789")[:-1]
        return self._of(f"resp_{key}").get(item_id) if key else None

    def _of(self, response_id: str) -> dict[str, wire.Item]:
        if (found := self._read.get(response_id)) is None:
            found = self._read[response_id] = {}
            record = self._store.get(self._owner, response_id)
            if record is not None:
                for item in (*_items(record.input), *_answered(record.response).output):
                    if item.id is not None:
                        found.setdefault(item.id, item)  # a client may give one id twice: the first one has it
        return found
