"""Which saved prompt caches are worth writing, match, and have to go."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from helexa.neuron.harness.base import SlotUse
from helexa.neuron.kv.states import (
    WORTH_TOKENS,
    State,
    continues,
    key_of,
    matching,
    outdated,
    settled_s,
    surplus,
    unsaved,
)

NOW = 1_000_000.0
DAY = 86_400.0


def state(name: str = "a", **fields: Any) -> State:
    usual: dict[str, Any] = {
        "key": "k",
        "model_id": "m",
        "files": ["/m.gguf"],
        "slots": 4,
        "tokens": 600,
        "blocks": [f"{name}1", f"{name}2"],
        "size_bytes": 100,
        "checksum": "",
        "used_at": NOW,
    }
    return State(name=name, **(usual | fields))


def gone(states: list[State], *, limit_bytes: int = 10_000, max_age_s: float = DAY) -> list[str]:
    return sorted(s.name for s in surplus(states, now=NOW, limit_bytes=limit_bytes, max_age_s=max_age_s))


def test_long_prefixes_that_were_used_are_worth_writing_the_last_used_first() -> None:
    slots = [
        SlotUse(0, WORTH_TOKENS, 3),
        SlotUse(1, 5000, 9),
        SlotUse(2, WORTH_TOKENS - 1, 8),  # computed before anybody notices
        SlotUse(3, 5000, None),  # as it was restored, and on disk
    ]
    assert [slot.index for slot in unsaved(slots, {})] == [1, 0]


def test_what_is_on_disk_already_is_not_written_again_until_it_was_used() -> None:
    assert unsaved([SlotUse(0, 500, 3)], {0: 3}) == []
    assert unsaved([SlotUse(0, 900, 4)], {0: 3}) == [SlotUse(0, 900, 4)]


def test_much_is_written_ahead_only_after_a_long_rest() -> None:
    assert settled_s(78e6) < 10
    assert settled_s(4e9) > 120


def test_a_state_is_for_the_same_files_engine_and_settings_alone() -> None:
    key = key_of([(10, 1), (20, 2)], "llama 1")
    assert key == key_of([(10, 1), (20, 2)], "llama 1")
    others = [
        key_of([(10, 2), (20, 2)], "llama 1"),
        key_of([(10, 1)], "llama 1"),
        key_of([(10, 1), (20, 2)], "llama 2"),
    ]
    assert key not in others
    assert len(set(others)) == 3


def test_as_many_states_are_restored_as_there_are_slots() -> None:
    states = [state(str(n), slots=2, used_at=NOW + n) for n in range(3)] + [state("x", key="other")]
    assert [s.name for s in matching(states, "k")] == ["2", "1"]
    assert matching(states, "unknown") == []


def test_what_no_longer_matches_its_model_is_dropped_and_nobody_elses() -> None:
    states = [state("now"), state("before", key="old"), state("else", key="old", model_id="other")]
    assert [s.name for s in outdated(states, "k", "m")] == ["before"]


def test_a_later_turn_of_a_conversation_takes_the_place_of_the_earlier() -> None:
    earlier, later = state("1", blocks=["x"], used_at=NOW - 9), state("2", blocks=["x", "y"])
    assert gone([earlier, later]) == ["1"]
    assert gone([earlier, state("2", blocks=["z", "y"])]) == []
    assert gone([earlier, state("2", key="other", blocks=["x", "y"])]) == []


def test_an_engine_that_does_not_tell_its_tokens_has_its_states_kept_apart() -> None:
    assert not continues(state("1"), state("2", blocks=[]))


def test_what_is_too_old_too_large_or_beyond_the_slots_goes() -> None:
    assert gone([state("a", used_at=NOW - DAY - 1)]) == ["a"]
    assert gone([state("a", size_bytes=101), state("b")], limit_bytes=100) == ["a"]
    assert gone([state("a", slots=1), state("b", slots=1, used_at=NOW - 1)]) == ["b"]


states = st.lists(
    st.tuples(
        st.sampled_from("kl"),
        st.integers(0, 400),
        st.floats(0, 2 * DAY),
        st.lists(st.sampled_from("xyz"), max_size=3),
        st.integers(1, 3),
    ),
    max_size=12,
).map(
    lambda rows: [
        state(str(n), key=key, size_bytes=size, used_at=NOW - age, blocks=blocks, slots=slots)
        for n, (key, size, age, blocks, slots) in enumerate(rows)
    ]
)


@given(states, st.integers(1, 1000), st.floats(1, 2 * DAY))
def test_what_stays_is_within_every_bound_and_settled(held: list[State], limit_bytes: int, max_age_s: float) -> None:
    dropped = surplus(held, now=NOW, limit_bytes=limit_bytes, max_age_s=max_age_s)
    stays = [s for s in held if s not in dropped]
    assert sum(s.size_bytes for s in stays) <= limit_bytes
    assert all(NOW - s.used_at <= max_age_s for s in stays)
    assert all(sum(o.key == s.key and o.used_at > s.used_at for o in stays) < s.slots for s in stays)
    assert surplus(stays, now=NOW, limit_bytes=limit_bytes, max_age_s=max_age_s) == []


@given(states)
def test_nothing_goes_that_no_bound_asks_for(held: list[State]) -> None:
    for s in surplus(held, now=NOW, limit_bytes=1 << 40, max_age_s=3 * DAY):
        later = [o for o in held if o is not s and o.key == s.key and o.used_at >= s.used_at]
        assert any(continues(o, s) for o in later) or len(later) >= s.slots


@given(states)
def test_a_description_survives_the_disk(held: list[State]) -> None:
    for s in held:
        assert msgspec.json.decode(msgspec.json.encode(s), type=State) == s
