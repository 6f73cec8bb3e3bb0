"""A gateway and a node on which models play scripts (playing_gguf.py): everything is real but the weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import playing_gguf
from tests.helpers.gateway import SETTINGS, cortex_process
from tests.helpers.neuron_daemon import Daemon, neuron
from tests.helpers.playing_gguf import Turn, call

CONTEXT = 24_576  # Claude Code's first request has some 12,400 tokens of SmolLM2's, and asks for 32,000 more
LISTED_S = 10.0

# For clients that are given tools by the test: read(path) and write(path, content).
GREETING = (
    Turn("<think>\nIs there one?\n</think>\n\nI look first.\n" + call("read", path="greeting.txt")),
    Turn(call("write", path="greeting.txt", content="Grüße 😀"), after="o such file"),
    Turn(call("read", path="greeting.txt"), after="written"),
    Turn("It says: Grüße 😀", after="Grüße 😀"),
)


@dataclass(frozen=True)
class Stage:
    gateway: Daemon
    node: Daemon
    folder: Path

    @property
    def url(self) -> str:
        return self.gateway.url

    def play(
        self,
        name: str,
        turns: Sequence[Turn],
        *,
        context: int = CONTEXT,
        aside: str | None = "A title",
        before: int = 0,
        template: str = playing_gguf.TEMPLATE,
    ) -> str:
        """Load a model that plays these turns (playing_gguf.write); the name by which the gateway serves it."""
        path = playing_gguf.write(self.folder / f"{name}.gguf", turns, aside=aside, before=before, template=template)
        loaded = self.node.http.post(
            "/models/load?wait=true",
            json={"model_id": name, "source": str(path), "context": context, "slots": 2, "threads": 2},
        )
        assert loaded.status == 200, loaded.text
        deadline = time.monotonic() + LISTED_S
        while self.gateway.http.get(f"/v1/models/{name}").status != 200:
            assert time.monotonic() < deadline, f"the gateway does not list {name}"
            time.sleep(0.05)
        return name


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    (folder / "node").mkdir(parents=True)
    toml = SETTINGS.replace("body_limit_mb = 1", "body_limit_mb = 8")
    with neuron(folder / "node") as node, cortex_process(folder, {"one": node.url}, toml=toml) as gateway:
        gateway.wait_for(event="node is up", node="one")
        yield Stage(gateway, node, folder)


def requests(site: Stage, model: str, count: int) -> list[dict[str, Any]]:
    """The gateway's lines about requests to this model, in the order in which they ended, once there are so many."""
    deadline = time.monotonic() + LISTED_S
    while True:
        lines = [line for line in site.gateway.said() if line["event"] == "request" and line.get("model") == model]
        if len(lines) >= count or time.monotonic() > deadline:
            return lines
        time.sleep(0.05)
