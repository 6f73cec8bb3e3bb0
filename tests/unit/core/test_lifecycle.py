"""The states of a model, and the hash that says whether two requests want the same thing."""

from __future__ import annotations

import msgspec
import pytest

from helexa.core.catalogue import ModelProfile
from helexa.core.lifecycle import NEXT, LoadRequest, ModelStatus


def test_every_state_can_be_left_and_every_state_can_be_reached() -> None:
    assert set(NEXT) == set(ModelStatus)
    assert all(NEXT[state] for state in ModelStatus)
    assert set().union(*NEXT.values()) == set(ModelStatus)


def test_no_state_leads_to_loaded_without_loading_or_having_been_loaded() -> None:
    before_loaded = {state for state, following in NEXT.items() if ModelStatus.LOADED in following}
    assert before_loaded == {ModelStatus.LOADING, ModelStatus.RECOVERING, ModelStatus.UNLOADING}


@pytest.mark.parametrize("word", ["", "ready", "LOADED", "sleeping"])
def test_an_unknown_status_word_is_not_taken_for_a_state(word: str) -> None:
    assert ModelStatus.parse(word) is None


def test_the_hash_does_not_depend_on_the_order_of_keys_or_on_the_spelling_of_model_id() -> None:
    one = msgspec.json.decode(b'{"model_id":"a","context":5,"slots":2}', type=LoadRequest)
    two = msgspec.json.decode(b'{"slots":2,"model":"a","context":5}', type=LoadRequest)
    other = msgspec.json.decode(b'{"model_id":"a","context":6,"slots":2}', type=LoadRequest)
    assert one.spec_hash() == two.spec_hash() != other.spec_hash()


def test_a_load_request_bears_the_whole_profile_and_none_of_the_gateways_wishes() -> None:
    profile = ModelProfile(id="a", quant="Q4_K_M", context=4096, pinned_on=["beast"], preload=True)
    assert msgspec.to_builtins(profile.load_request()) == {"model_id": "a", "quant": "Q4_K_M", "context": 4096}
