"""What is kept of Responses: bounds, owners, conversations."""

from __future__ import annotations

import json
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.core.bodies import MAX_MESSAGES
from helexa.core.dialects.responses_items import try_listed
from helexa.core.errors import NotFound, PreviousResponseNotFound, RequestTooLarge
from helexa.cortex import response_file, response_store
from helexa.cortex.response_file import FileStore
from helexa.cortex.response_store import (
    CannotKeep,
    Items,
    MemoryStore,
    Record,
    ResponseStore,
    chain,
    conversation,
    owner_of,
)

ME, YOU = owner_of("Bearer me"), owner_of("you")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Make = Callable[..., ResponseStore]


@pytest.fixture(params=["memory", "file"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    made: list[ResponseStore] = []

    def store(clock: Callable[[], float], *, max_bytes: int = 1 << 20, age_s: float = 60) -> ResponseStore:
        if request.param == "memory":
            made.append(MemoryStore(max_bytes=max_bytes, age_s=age_s, clock=clock))
        else:
            made.append(FileStore(tmp_path / "kept.sqlite", max_bytes=max_bytes, age_s=age_s, clock=clock))
        return made[-1]

    yield store
    for each in made:
        each.close()


def record(number: int, previous: int | None = None, *, owner: str = ME, size: int = 10, **response: Any) -> Record:
    key = f"hx{number:x}"
    said = {"type": "message", "id": f"msg_{key}o0", "role": "assistant", "content": f"said {number}"}
    body = {"id": f"resp_{key}", "output": [said], **response}
    asked = json.dumps({"input": f"asked {number}" + "x" * size}).encode()
    before = f"resp_hx{previous:x}" if previous is not None else None
    items = try_listed(asked, key)
    assert items is not None
    return Record(f"resp_{key}", owner, before, items, json.dumps(body).encode())


def test_what_was_put_is_got_by_its_owner_alone(make: Make) -> None:
    store = make(Clock())
    kept = record(1)
    store.put(kept)
    assert store.get(ME, kept.id) == kept
    for call in (store.get, store.delete):
        with pytest.raises(NotFound):
            call(YOU, kept.id)
    assert store.get(ME, "resp_hx2") is None
    assert store.delete(ME, kept.id)
    assert not store.delete(ME, kept.id)
    assert store.get(ME, kept.id) is None


def test_whoever_uses_a_response_keeps_it(make: Make) -> None:
    clock = Clock()
    store = make(clock, age_s=60)
    for number in (1, 2):
        store.put(record(number))
    clock.now += 50
    assert store.get(ME, "resp_hx1") is not None
    clock.now += 20
    assert store.get(ME, "resp_hx1") is not None
    assert store.get(ME, "resp_hx2") is None


@given(sizes=st.lists(st.integers(0, 3000), max_size=12), used=st.lists(st.integers(0, 11), max_size=6))
def test_the_least_recently_used_go_first_and_the_bound_holds(sizes: list[int], used: list[int]) -> None:
    store = MemoryStore(max_bytes=8000, age_s=60, clock=Clock())
    order: list[Record] = []
    for number, size in enumerate(sizes):
        new = record(number, size=size)
        store.put(new)
        order.append(new)
        while sum(each.size for each in order) > 8000:
            order.pop(0)
        for wanted in used:
            if (hit := store.get(ME, f"resp_hx{wanted:x}")) is not None:
                order.remove(hit)
                order.append(hit)
    assert [store.get(ME, f"resp_hx{n:x}") is not None for n in range(len(sizes))] == [
        any(each.id == f"resp_hx{n:x}" for each in order) for n in range(len(sizes))
    ]


def test_a_response_beyond_the_bound_is_not_kept(make: Make) -> None:
    store = make(Clock(), max_bytes=2000)
    store.put(record(1))
    store.put(record(2, size=3000))
    assert store.get(ME, "resp_hx2") is None
    assert store.get(ME, "resp_hx1") is not None


# the file


def test_a_file_outlives_its_gateway_and_is_nobody_else_s(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "kept.sqlite"
    store = FileStore(path, max_bytes=1 << 20, age_s=60, clock=clock)
    for number in (1, 2, 3):
        store.put(record(number))
    store.delete(ME, "resp_hx3")
    assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()} == {0o600}
    store.close()
    clock.now += 50
    again = FileStore(path, max_bytes=1 << 20, age_s=60, clock=clock)
    assert again.get(ME, "resp_hx1") == record(1)
    with pytest.raises(NotFound):
        again.get(YOU, "resp_hx2")
    assert again.get(ME, "resp_hx3") is None
    again.close()
    clock.now += 50  # the first was used, the second was only asked for
    third = FileStore(path, max_bytes=1 << 20, age_s=60, clock=clock)
    assert third.get(ME, "resp_hx1") is not None
    assert third.get(ME, "resp_hx2") is None
    third.close()


def test_a_file_has_the_same_bound(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "kept.sqlite"
    store = FileStore(path, max_bytes=5000, age_s=60, clock=clock)
    for number in range(20):
        clock.now += 1
        store.put(record(number))
    store.close()
    again = FileStore(path, max_bytes=5000, age_s=60, clock=clock)
    held = [number for number in range(20) if again.get(ME, f"resp_hx{number:x}") is not None]
    assert held == list(range(20 - len(held), 20))
    assert len(held) == 5000 // record(19).size
    again.close()


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "kept.sqlite"
    path.touch(0o644)
    FileStore(path, max_bytes=5000, age_s=60, clock=Clock()).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"not a database, and longer than a header of one is " * 4, None])
def test_what_is_no_file_of_ours_is_refused_with_its_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "kept.sqlite"
    if content is None:
        path = tmp_path / "nowhere" / "kept.sqlite"
    else:
        path.write_bytes(content)
    with pytest.raises(CannotKeep, match=str(path)):
        FileStore(path, max_bytes=5000, age_s=60, clock=Clock())


def without_room(path: Path) -> sqlite3.Connection:
    connection = response_file._open(path)
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    return connection


def read_only(path: Path) -> sqlite3.Connection:
    connection = response_file._open(path)
    connection.execute("PRAGMA query_only = ON")
    return connection


def not_opened(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path.parent / "nowhere" / "kept.sqlite")


@pytest.fixture(params=[without_room, read_only, not_opened])
def trouble(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Trouble:
    return Trouble(request.param, monkeypatch)


class Trouble:
    """What the writer opens, until it is over. The reader, which opens first, has none."""

    def __init__(self, opens: Callable[[Path], sqlite3.Connection], monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_over = False
        self.tries = 0
        self.tried_again = threading.Event()
        well = response_file._open
        reader = threading.current_thread()

        def open_(path: Path) -> sqlite3.Connection:
            if threading.current_thread() is reader:
                return well(path)
            self.tries += 1
            if self.tries > 2:
                self.tried_again.set()
            return well(path) if self.is_over else opens(path)

        monkeypatch.setattr(response_file, "_open", open_)
        for each in (without_room, read_only):  # they open as the module did
            monkeypatch.setitem(each.__globals__, "response_file", SimpleNamespace(_open=well))


def test_what_cannot_be_written_now_is_tried_again_until_it_can(tmp_path: Path, trouble: Trouble) -> None:
    clock, path = Clock(), tmp_path / "kept.sqlite"
    store = FileStore(path, max_bytes=60_000, age_s=60, clock=clock, again_s=0.001)
    kept = [record(number, size=9000) for number in range(4)]
    for each in kept:
        store.put(each)
    assert store.delete(ME, kept[3].id)
    assert trouble.tried_again.wait(10)
    assert [store.get(ME, each.id) for each in kept] == [*kept[:3], None]
    trouble.is_over = True
    store.close()
    again = FileStore(path, max_bytes=60_000, age_s=60, clock=clock)
    assert [again.get(ME, each.id) for each in kept] == [*kept[:3], None]
    again.close()


def test_a_file_that_stays_unwritable_has_the_bound_in_memory_and_does_not_hold_up_the_end(
    tmp_path: Path, trouble: Trouble
) -> None:
    store = FileStore(tmp_path / "kept.sqlite", max_bytes=30_000, age_s=60, clock=Clock(), again_s=60)
    kept = [record(number, size=9000) for number in range(8)]
    for each in kept:
        store.put(each)
    held = [each for each in kept if store.get(ME, each.id) is not None]
    assert held == kept[-len(held) :]
    assert sum(each.size for each in held) <= 30_000
    assert store._unwritten <= 30_000
    store.close()
    assert not store._thread.is_alive()


# conversations


def test_a_conversation_is_all_that_a_response_continues() -> None:
    store = MemoryStore(max_bytes=1 << 20, age_s=60, clock=Clock())
    for number, previous in ((1, None), (2, 1), (3, 2)):
        store.put(record(number, previous, size=0))
    said = conversation(chain(store, ME, "resp_hx3"))
    texts = [item.content if isinstance(item.content, str) else item.content[0].text for item in said if item.content]
    assert texts == ["asked 1", "said 1", "asked 2", "said 2", "asked 3", "said 3"]
    store.delete(ME, "resp_hx1")
    with pytest.raises(PreviousResponseNotFound, match="resp_hx1"):
        chain(store, ME, "resp_hx3")


@pytest.mark.parametrize(("number", "size"), [(2, response_store.MOST_BYTES // 2), (MAX_MESSAGES + 1, 0)])
def test_a_conversation_that_would_hold_up_the_loop_is_refused(number: int, size: int) -> None:
    store = MemoryStore(max_bytes=1 << 30, age_s=60, clock=Clock())
    for each in range(number):
        store.put(record(each, each - 1 if each else None, size=size))
    with pytest.raises(RequestTooLarge) as caught:
        chain(store, ME, f"resp_hx{number - 1:x}")
    assert caught.value.param == "previous_response_id"
    assert len(chain(store, ME, f"resp_hx{number - 2:x}")) == number - 1


@pytest.mark.parametrize("kind", ["function_call", "custom_tool_call"])
def test_a_call_that_was_cut_off_is_not_shown_again(kind: str) -> None:
    calls = [{"type": kind, "call_id": name, "name": "f"} for name in "ab"]
    said = conversation([record(1, output=calls), record(2, output=calls, status="incomplete")])
    assert [item.call_id for item in said if item.type == kind] == ["a", "b", "a"]


def test_an_item_is_found_by_its_id() -> None:
    store = MemoryStore(max_bytes=1 << 20, age_s=60, clock=Clock())
    store.put(record(0x12))
    items = Items(store, ME)
    answered = items.find("msg_hx12o0")
    assert answered is not None
    assert answered.content == "said 18"
    asked = items.find("msg_hx12i0")
    assert asked is not None
    assert asked.role == "user"
    for lost in ("msg_hx12o1", "msg_hx13o0", "", "msg", "msg_", "msg_1"):
        assert items.find(lost) is None
    with pytest.raises(NotFound):
        Items(store, YOU).find("msg_hx12o0")


def test_a_response_is_read_once_however_many_of_its_items_are_asked_for() -> None:
    class Counting(MemoryStore):
        reads = 0

        def get(self, owner: str, response_id: str) -> Record | None:
            self.reads += 1
            return super().get(owner, response_id)

    store = Counting(max_bytes=1 << 20, age_s=60, clock=Clock())
    calls = [{"type": "function_call", "id": f"fc_hx1o{i}", "call_id": f"c{i}", "name": "f"} for i in range(500)]
    store.put(record(1, output=calls))
    items = Items(store, ME)
    found = [items.find(call["id"]) for call in calls]
    assert [item.call_id for item in found if item is not None] == [call["call_id"] for call in calls]
    assert [items.find(f"msg_hx{n}o0") for n in (2, 2, 1)] == [None, None, None]
    assert store.reads == 2


def test_an_owner_is_told_by_the_key_which_is_not_kept() -> None:
    assert owner_of("Bearer me") == owner_of("me") != owner_of("you")
    assert "me" not in {owner_of("me"), owner_of("Bearer me")}
    assert owner_of(None) == owner_of("")


@given(
    st.lists(
        st.fixed_dictionaries({}, optional={"type": st.sampled_from(["message", "function_call"]), "id": st.just("x")}),
        max_size=4,
    )
)
def test_each_listed_item_has_an_id_and_a_type(items: list[dict[str, Any]]) -> None:
    kept = try_listed(json.dumps({"input": items}).encode(), "hx1")
    assert kept is not None
    made = json.loads(kept)
    assert len(made) == len(items)
    assert all(item["id"] and item["type"] for item in made)
