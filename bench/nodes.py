"""Our own two programs as the benches start them: a real `neuron`, a real `cortex`, and what is asked of them.

The node's harness is the real one but for one thing: it notes where its engine listens and with which key, so that a
bench can ask the very same process without us in between.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from bench.measure import Tree, free_port, running, wait_for_port
from helexa.neuron.harness.base import Plan
from helexa.neuron.harness.llama import LlamaHarness

ROOT: Final = Path(__file__).parents[1]
OURS: Final = f"{ROOT}:{ROOT / 'src'}"  # PYTHONPATH: what is measured is this tree, wherever it is
SPECS: Final = "HELEXA_BENCH_SPECS"  # the folder for those notes


class OpenLlama(LlamaHarness):
    """The llama harness, whose orders to its host can be read."""

    def host_spec(self, plan: Plan, socket: Path, api_key: str, states: Path | None = None) -> dict[str, Any]:
        spec = super().host_spec(plan, socket, api_key, states)
        note = Path(os.environ[SPECS]) / f"{plan.files.model_id}.json"
        note.touch(mode=0o600)
        note.write_text(json.dumps(spec))
        return spec


def serve_neuron() -> None:
    """`neuron serve --config`, with the harness above."""
    from helexa.core import logs
    from helexa.core.config import load_neuron
    from helexa.neuron.serve import run

    logs.configure()
    run(load_neuron(Path(sys.argv[1]), os.environ, print), {"llama": OpenLlama()})


@dataclass(frozen=True, slots=True)
class Program:
    """One of ours that runs."""

    tree: Tree
    port: int
    folder: Path

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 120) -> Any:
        """The answer's JSON. SystemExit, with the log's end, where it is not 200."""
        status, answer = self.try_ask(method, path, body, timeout_s)
        if status != 200:
            tail = self.tree.log.read_text(errors="replace")[-2000:]
            raise SystemExit(f"{method} {path}: {status} {answer}; {self.tree.log} ends with:\n{tail}")
        return answer

    def try_ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 120
    ) -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            head = {"content-type": "application/json"} if body is not None else {}
            connection.request(method, path, None if body is None else json.dumps(body).encode(), head)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            connection.close()

    def load(self, model_id: str, **profile: Any) -> None:
        self.ask("POST", "/models/load?wait=true", {"model_id": model_id, **profile})

    def unload(self, model_id: str) -> None:
        self.ask("POST", "/models/unload", {"model_id": model_id, "drain_s": 10})

    def spec(self, model_id: str) -> dict[str, Any]:
        """What the model's host was told: socket, api_key, options."""
        spec: dict[str, Any] = json.loads((self.folder / f"{model_id}.json").read_text())
        return spec

    def hosts(self) -> list[int]:
        """Process ids of the host processes, the spare included."""
        found = []
        for pid in self.tree.members()[1:]:
            try:
                if b"helexa.neuron.host" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
            except OSError:
                continue
        return found


@contextmanager
def neuron(folder: Path, *, cores: str, toml: str = "") -> Iterator[Program]:
    """A node that is ready. Its folder gets the notes and the log."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = folder / "neuron.toml"
    config.write_text(f"port = {port}\n{toml}\n")
    command = [sys.executable, "-c", "from bench.nodes import serve_neuron; serve_neuron()", config]
    env = {"PYTHONPATH": OURS, SPECS: str(folder), "HF_HUB_OFFLINE": "1", "CACHE_DIRECTORY": str(folder)}
    with running(command, cores=cores, log=folder / "neuron.log", env=env) as tree:
        wait_for_port(port, tree)
        program = Program(tree, port, folder)
        _until(lambda: program.try_ask("GET", "/models")[0] == 200, "the node is not ready")
        yield program


@contextmanager
def cortex(
    folder: Path,
    *nodes: Program,
    cores: str,
    models: bool = True,
    serve: Sequence[str | Path] = (),
    catalogue: str = "",
) -> Iterator[Program]:
    """A gateway in front of these nodes; up when it answers, and has seen a model where they have some. serve: what is
    run with --config, in place of `cortex serve`. catalogue: the text of its models.toml."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "cortex.toml"
    names = ["node"] if len(nodes) == 1 else [f"n{at}" for at in range(len(nodes))]
    config.write_text(
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:0"\n'
        + "".join(
            f'[[neurons]]\nname = "{name}"\nendpoint = "http://127.0.0.1:{node.port}"\n'
            for name, node in zip(names, nodes, strict=True)
        )
    )
    (folder / "models.toml").write_text(catalogue)
    command = [*(serve or (Path(sys.executable).parent / "cortex", "serve")), "--config", config]
    with running(command, cores=cores, log=folder / "cortex.log", env={"PYTHONPATH": OURS}) as tree:
        wait_for_port(port, tree)
        program = Program(tree, port, folder)
        if models:
            _until(lambda: bool(program.ask("GET", "/v1/models")["data"]), "the gateway does not see the node's models")
        yield program


def _until(true: Any, otherwise: str, within_s: float = 30) -> None:
    end = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end:
            raise SystemExit(otherwise)
        time.sleep(0.02)


def versions() -> str:
    """Of ours, and of the engine that we embed."""
    from helexa.core.version import describe

    ours = describe()
    commit = f" ({ours['commit'][:12]})" if ours["commit"] else ""
    try:
        engine = version("xllamacpp")
    except PackageNotFoundError:
        engine = "not installed"
    return f"helexa {ours['version']}{commit}, xllamacpp {engine}"
