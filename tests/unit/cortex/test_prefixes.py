from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.cortex.prefixes import APART, STEP, Prefixes, Prompt, read

MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=60).map(lambda text: text * 30)}
)
MESSAGES = st.lists(MESSAGE, min_size=1, max_size=8)
TOOLS = [{"type": "function", "function": {"name": "read_file", "description": "x" * 400}}]


def chat(messages: Sequence[Any], **fields: Any) -> bytes:
    return json.dumps({"model": "m", **fields, "messages": messages, "stream": True}).encode()


def prompt(body: bytes, model: str = "m") -> Prompt:
    found = read(body, model)
    assert found is not None
    return found


def said(size: int, word: str = "a") -> dict[str, str]:
    return {"role": "user", "content": word * size}


# what is read


@given(first=MESSAGES, more=MESSAGES)
def test_a_conversation_that_grows_keeps_the_marks_of_its_beginning(
    first: list[dict[str, str]], more: list[dict[str, str]]
) -> None:
    before, after = prompt(chat(first)), prompt(chat(first + more))
    assert after.hashes[: len(before.hashes)] == before.hashes
    assert after.ends[: len(before.ends)] == before.ends


@given(messages=MESSAGES, cut=st.integers(0, 7))
def test_a_change_in_one_message_changes_all_marks_from_there_on(messages: list[dict[str, str]], cut: int) -> None:
    at = min(cut, len(messages) - 1)
    changed = [*messages]
    changed[at] = {**changed[at], "content": "#" + changed[at]["content"]}
    before, after = prompt(chat(messages)), prompt(chat(changed))
    same = prompt(chat(messages[:at])).hashes if at else []
    assert set(before.hashes) & set(after.hashes) == set(same)


@given(messages=MESSAGES)
def test_marks_go_up_and_are_never_near_each_other(messages: list[dict[str, str]]) -> None:
    found = prompt(chat(messages))
    assert all(b - a >= APART for a, b in pairwise([0.0, *found.ends]))
    assert len(found.hashes) == len(found.ends) == len(set(found.hashes))
    assert max(found.ends, default=0.0) <= found.weight


def test_only_the_prompt_counts_and_not_where_the_body_has_it_or_what_else_is_there() -> None:
    messages = [said(500), said(700, "b")]
    other = json.dumps({"temperature": 0.3, "messages": messages, "user": "x", "model": "alias"}).encode()
    assert prompt(other) == prompt(chat(messages))


@pytest.mark.parametrize("field", ["tools", "system", "instructions"])
def test_what_stands_before_the_messages_in_the_rendered_prompt_stands_before_them_here(field: str) -> None:
    messages = [said(600)]
    bare, led = prompt(chat(messages)), prompt(chat(messages, **{field: TOOLS}))
    assert not set(bare.hashes) & set(led.hashes)
    assert prompt(chat([said(600, "b")], **{field: TOOLS})).hashes[0] == led.hashes[0]


def test_the_same_bytes_as_tools_and_as_system_are_not_the_same_prompt() -> None:
    assert prompt(chat([said(600)], tools=TOOLS)).hashes != prompt(chat([said(600)], system=TOOLS)).hashes


def test_another_model_shares_nothing() -> None:
    body = chat([said(600)])
    assert not set(prompt(body).hashes) & set(prompt(body, "other").hashes)


def test_a_long_message_has_a_mark_every_four_kilobytes() -> None:
    found = prompt(chat([said(3 * STEP)]))
    assert found.ends[:3] == [STEP, 2 * STEP, 3 * STEP]


@pytest.mark.parametrize("key", ["prompt", "input"])
def test_a_text_that_grows_keeps_its_four_kilobytes(key: str) -> None:
    before, after = (prompt(json.dumps({key: "a" * size}).encode()) for size in (2 * STEP + 9, 3 * STEP))
    assert after.hashes[:2] == before.hashes[:2]


def test_token_ids_are_a_text_that_grows_and_not_thousands_of_messages() -> None:
    before, after = (prompt(json.dumps({"prompt": [1000] * count}).encode()) for count in (1400, 3000))
    assert before.ends[0] == STEP
    assert after.hashes[:2] == before.hashes[:2]


def test_a_body_that_is_too_large_to_look_into_is_known_by_its_session_alone() -> None:
    found = read(chat([said(3 << 20)]), "m", "talk")
    assert found is not None
    assert (found.hashes, found.session) == ((), "talk")


def test_the_items_of_responses_are_messages_too() -> None:
    items = [said(600), said(700, "b")]
    assert prompt(json.dumps({"input": items}).encode()) == prompt(chat(items))


def test_an_image_weighs_what_it_comes_to_in_tokens_and_not_what_its_base64_does() -> None:
    def shown(pixels: str) -> bytes:
        url = "data:image/png;base64," + pixels * 300_000
        return chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])

    assert prompt(shown("A")).weight == STEP
    assert prompt(shown("A")).hashes != prompt(shown("B")).hashes


@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b"{}", b'{"messages": []}', b'{"messages": "x"}', b'{"messages": [{]}', b'{"input": 7}']
)
def test_what_has_no_prompt_is_left_to_the_node(body: bytes) -> None:
    assert read(body, "m") is None


def test_a_header_names_the_session_before_the_body_does() -> None:
    body = chat([said(9)], prompt_cache_key="key")
    assert prompt(body).session == "key"
    found = read(body, "m", "header")
    assert found is not None
    assert found.session == "header"


# who holds it


def chain(*path: int, step: float = 10.0) -> Prompt:
    """A prompt by the numbers of its messages."""
    hashes = [hash(path[: at + 1]) for at in range(len(path))]
    ends = [step * (at + 1) for at in range(len(path))]
    return Prompt(hashes, ends, ends[-1])


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)


@given(sent=st.lists(st.tuples(st.sampled_from("abc"), PATHS), max_size=30), asked=PATHS)
def test_a_match_is_the_longest_beginning_that_the_holder_was_sent(
    sent: list[tuple[str, tuple[int, ...]]], asked: tuple[int, ...]
) -> None:
    known: Prefixes[str] = Prefixes()
    for holder, path in sent:
        known.note(holder, chain(*path), 1e9)

    def shared(path: tuple[int, ...]) -> int:
        return next(
            (at for at, (a, b) in enumerate(zip(path, asked, strict=False)) if a != b), min(len(path), len(asked))
        )

    best: dict[str, int] = {}
    for holder, path in sent:
        best[holder] = max(best.get(holder, 0), shared(path))
    found = known.match(chain(*asked), 3)
    assert found == {holder: 10.0 * count for holder, count in best.items() if count}
    assert list(found.values()) == sorted(found.values(), reverse=True)


@given(sent=st.lists(st.tuples(st.sampled_from("ab"), PATHS), max_size=40), bound=st.integers(10, 120))
def test_what_is_remembered_of_a_holder_stays_within_its_bound_and_is_a_set_of_whole_beginnings(
    sent: list[tuple[str, tuple[int, ...]]], bound: int
) -> None:
    known: Prefixes[str] = Prefixes()
    for holder, path in sent:
        known.note(holder, chain(*path), bound)
        assert known.sizes[holder] <= bound
    for holder, path in sent:
        held = known.match(chain(*path), 9).get(holder, 0.0)
        for count in range(1, int(held / 10) + 1):
            assert known.match(chain(*path[:count]), 9)[holder] == 10.0 * count


def test_the_end_of_the_conversation_used_longest_ago_goes_first() -> None:
    known: Prefixes[str] = Prefixes()
    for path in ((1, 1, 1), (2, 2, 2), (1, 1, 1), (3, 3)):
        known.note("a", chain(*path), 80.0)
    held = {path: known.match(chain(*path), 1).get("a", 0.0) for path in ((1, 1, 1), (2, 2, 2), (3, 3))}
    assert held == {(1, 1, 1): 30.0, (2, 2, 2): 30.0, (3, 3): 20.0}
    known.note("a", chain(4, 4), 80.0)
    assert known.match(chain(2, 2, 2), 1) == {"a": 10.0}


def test_a_holder_that_is_forgotten_holds_nothing_and_no_session() -> None:
    known: Prefixes[str] = Prefixes()
    asked = Prompt([1, 2], [10.0, 20.0], 20.0, "talk")
    known.note("a", asked, 1e9)
    known.note("b", chain(7), 1e9)
    assert known.keep_only(["b"]) == ["a"]
    assert (known.match(asked, 2), known.last_of(asked), set(known.sizes)) == ({}, None, {"b"})


def test_a_session_is_where_it_was_last() -> None:
    known: Prefixes[str] = Prefixes()
    for holder, weight in (("a", 100.0), ("b", 300.0)):
        known.note(holder, Prompt([], [], weight, "talk"), 1e9)
    assert known.last_of(Prompt([], [], 5.0, "talk")) == ("b", 300.0)
    assert known.last_of(Prompt([], [], 5.0, "other")) is None
