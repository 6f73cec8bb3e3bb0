"""One gateway and one node for the tests of all clients; each loads models of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.helpers.stage import Stage, stage


@pytest.fixture(scope="package")  # not longer: other tests count the processes that are left
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("clients")) as ready:
        yield ready
