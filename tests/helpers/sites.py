"""A real gateway before a real node with a real model, for the tests that come as a vendor's SDK."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.helpers.gateway import cortex_process
from tests.helpers.models import smollm2
from tests.helpers.neuron_daemon import Daemon, neuron

MODEL: Final = "smollm2"
CONTEXT: Final = 1024
_PROFILE: Final = {"model_id": MODEL, "context": CONTEXT, "slots": 2, "threads": 1}


@contextmanager
def served(folder: Path, aliases: str) -> Iterator[tuple[Daemon, Daemon]]:
    """The gateway and the node, which has loaded MODEL.   aliases: lines of [aliases] in models.toml."""
    (folder / "node").mkdir()
    with neuron(folder / "node") as node:
        loaded = node.http.post("/models/load?wait=true", json={**_PROFILE, "source": str(smollm2())})
        assert loaded.status == 200, loaded.text
        models = f'[[models]]\nid = "{MODEL}"\n[aliases]\n{aliases}\n'
        with cortex_process(folder, {"one": node.url}, models=models) as gateway:
            yield gateway, node
