"""One gateway and one node for the tests of a client, which load models of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.helpers.stage import Stage, stage


@pytest.fixture(scope="module")  # not longer: other tests count the processes that are left
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("clients")) as ready:
        yield ready
