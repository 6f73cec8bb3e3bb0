from __future__ import annotations

import pytest

from helexa.core.catalogue import ModelProfile
from helexa.cortex.too_long import context_of, may_be_too_long


@pytest.mark.parametrize(
    ("context", "trained", "known"),
    [(4096, 8192, 4096), (2000, None, 2048), (257, None, 512), (None, 8192, 8192), (None, None, None)],
)
def test_the_context_is_the_profiles_in_the_engines_steps_else_what_it_was_trained_for(
    context: int | None, trained: int | None, known: int | None
) -> None:
    assert context_of(ModelProfile(id="m", context=context), trained) == known


def test_what_no_catalogue_names_has_the_context_that_it_was_trained_for() -> None:
    assert context_of(None, 8192) == 8192


def test_a_body_is_in_doubt_only_where_it_has_two_bytes_for_each_token() -> None:
    assert not may_be_too_long(b"x" * 8191, 4096)
    assert may_be_too_long(b"x" * 8192, 4096)
