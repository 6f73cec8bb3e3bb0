from __future__ import annotations

from helexa.cortex.names import closest


def test_the_nearest_of_many_names_is_found_without_a_close_look_at_each() -> None:
    known = [f"org/model-{i}-B" for i in range(2000)] + ["Qwen/Qwen3-Coder-30B-A3B-Instruct"]
    assert closest("qwen3-coder-30b-a3b-instruct", known) == ["Qwen/Qwen3-Coder-30B-A3B-Instruct"]
    assert "org/model-77-B" in closest("org/model-77b", known)


def test_a_name_like_nothing_has_no_nearest() -> None:
    assert closest("zzzz", [f"org/model-{i}" for i in range(100)]) == []
    assert closest("", ["a"]) == []
