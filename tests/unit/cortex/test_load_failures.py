from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.helpers.fleets import answers, fleet, info

from helexa.core.catalogue import ModelProfile
from helexa.core.errors import (
    Conflict,
    Dialect,
    HelexaError,
    LoadFailed,
    ModelNotServable,
    NeverLoads,
    NoNode,
    Overloaded,
    render,
)
from helexa.cortex.load_failures import no_place, on_node, read_refusal
from helexa.cortex.swapper import Failure, Kind

M = ModelProfile(id="m")


def body(code: str, message: str = "why", **details: Any) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": "t", "param": None, "code": code, **details}})


@pytest.mark.parametrize(
    ("status", "sent", "kind"),
    [
        (409, body("insufficient_memory"), Kind.NO_ROOM),
        (409, body("loaded_differently"), Kind.DIFFERENT),
        (409, body("conflict"), Kind.FAILED),
        (422, body("load_impossible"), Kind.NEVER),
        (422, body("whatever"), Kind.NEVER),
        (400, body("invalid_request_error"), Kind.NEVER),
        (404, body("model_not_found"), Kind.NEVER),
        (403, body("permission_denied"), Kind.NEVER),
        (503, body("model_unloading"), Kind.BUSY),
        (503, body("shutting_down"), Kind.GONE),
        (503, body("load_failed"), Kind.FAILED),
        (503, body("overloaded"), Kind.BUSY),
        (422, body("insufficient_disk"), Kind.NEVER),
        (500, b"<html>oops</html>", Kind.FAILED),
        (500, b"", Kind.FAILED),
        (500, b'{"error": "\xff"}', Kind.FAILED),
        (502, b'{"error": "a string"}', Kind.FAILED),
        (500, b'[1, {"error": {}}]', Kind.FAILED),
        (500, b'{"error": {"message": 7, "code": []}}', Kind.FAILED),
    ],
)
def test_a_nodes_refusal_is_read_by_its_code_then_its_status_whatever_its_body_is(
    status: int, sent: bytes, kind: Kind
) -> None:
    failure = read_refusal("beast", status, sent)
    assert failure.kind is kind
    assert failure.reason


def test_the_nodes_words_and_figures_are_kept() -> None:
    sent = body("insufficient_memory", "beast is full", need_mb=900, free_mb=100, secret="x")
    failure = read_refusal("beast", 409, sent)
    assert failure.reason == "beast is full"
    assert failure.details == {"need_mb": 900, "free_mb": 100}


def no_room(node: str, need: int = 9000, free: int = 100) -> Failure:
    return Failure(node, Kind.NO_ROOM, "no room", {"need_mb": need, "free_mb": free})


def test_where_memory_is_in_the_way_the_error_says_whose_on_which_node() -> None:
    view = fleet("beast", "benjy", models=[M])
    answers(view, "beast", info("big", vram_used_mb=19000, active_requests=2), info("tiny", vram_used_mb=10))
    answers(view, "benjy", info("phi", vram_used_mb=700), info("cold", "unloaded"))
    error = no_place(view, "m", [no_room("beast"), no_room("benjy", free=50)], 1)
    assert isinstance(error, Overloaded)
    assert error.retry_after_s is not None
    for part in ["beast needs 9,000 MB and has 100 MB free", "big holds 19,000 MB with 2 requests", "phi holds 700 MB"]:
        assert part in error.message
    assert "cold" not in error.message
    told = msgspec.json.decode(render(error, Dialect.OPENAI, "r"))["error"]
    assert told["code"] == "overloaded"
    assert told["nodes"][0]["need_mb"] == 9000
    assert [m["id"] for m in told["nodes"][0]["models"]] == ["big", "tiny"]


def outcome(*failures: Failure, up: tuple[str, ...] = ("beast", "benjy"), profile: ModelProfile = M) -> HelexaError:
    view = fleet("beast", "benjy", models=[profile])
    for name in up:
        answers(view, name)
    return no_place(view, "m", failures, 12.2)


BEAST_NEVER = Failure("beast", Kind.NEVER, "can never fit")
BENJY_NEVER = Failure("benjy", Kind.NEVER, "the file is truncated")
BEAST_FAILED = Failure("beast", Kind.FAILED, "the host died")
BEAST_GONE = Failure("beast", Kind.GONE, "died during the load")


def test_not_servable_only_when_every_node_that_may_hold_it_said_never() -> None:
    error = outcome(BEAST_NEVER, BENJY_NEVER)
    assert isinstance(error, ModelNotServable)
    assert "beast: can never fit; benjy: the file is truncated" in error.message
    error = outcome(BEAST_NEVER, up=("beast",))
    assert isinstance(error, NoNode)
    assert "benjy is down" in error.message
    assert isinstance(outcome(BEAST_NEVER, profile=ModelProfile(id="m", pinned_on=["beast"])), ModelNotServable)


def test_a_load_that_failed_is_told_with_the_nodes_reason_and_when_to_try_again() -> None:
    error = outcome(BEAST_FAILED, BENJY_NEVER)
    assert isinstance(error, LoadFailed)
    assert "beast: the host died" in error.message
    assert error.retry_after_s == 13


def test_no_node_alive_says_what_is_wrong_with_each() -> None:
    error = outcome(up=())
    assert isinstance(error, NoNode)
    assert "beast is down (not asked yet); benjy is down" in error.message
    assert isinstance(outcome(BEAST_GONE, up=("beast",)), NoNode)
    assert isinstance(no_place(fleet(models=[M]), "m", [], 5), NoNode)


def test_a_pin_on_a_node_that_is_not_configured_is_a_mistake_to_mend() -> None:
    error = outcome(profile=ModelProfile(id="m", pinned_on=["baest"]))
    assert isinstance(error, ModelNotServable)
    assert "pinned on baest" in error.message


@pytest.mark.parametrize(
    ("kind", "cls", "code"),
    [
        (Kind.NO_ROOM, Conflict, "insufficient_memory"),
        (Kind.DIFFERENT, Conflict, "loaded_differently"),
        (Kind.NEVER, NeverLoads, "load_impossible"),
        (Kind.GONE, NoNode, "no_node"),
        (Kind.FAILED, LoadFailed, "load_failed"),
        (Kind.BUSY, LoadFailed, "load_failed"),
    ],
)
def test_an_operator_who_named_the_node_gets_the_nodes_own_answer(
    kind: Kind, cls: type[HelexaError], code: str
) -> None:
    error = on_node("m", Failure("beast", kind, "the reason"))
    assert isinstance(error, cls)
    assert error.code == code
    assert error.message == "m on beast: the reason"
