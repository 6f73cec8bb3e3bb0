"""A real `neuron serve` for tests: a process of its own on a free port, whose log is read for the address."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

from tests.helpers.http import Http

ROOT: Final = Path(__file__).parents[2]
# PYTHONPATH of every process that a test starts: what is tested is this tree, wherever helexa is installed from.
OURS: Final = f"{ROOT}:{ROOT / 'src'}"
START_S: Final = 30.0
STOP_S: Final = 30.0


class Daemon:
    """command: what follows the interpreter. The process is waited for in `stop`, or killed by `neuron`'s end."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.runtime = Path()  # where its sockets are
        self._news = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url: str = self.wait_for(event="listening")["url"]
        except AssertionError:
            self.close()
            raise
        self.http = Http(self.url)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_for(self, timeout_s: float = START_S, **fields: Any) -> dict[str, Any]:
        """The first line of the log with these fields; AssertionError where the daemon ends, or takes too long."""

        def found() -> dict[str, Any] | None:
            return next((line for line in self.said() if fields.items() <= line.items()), None)

        with self._news:
            self._news.wait_for(lambda: self._ended or found() is not None, timeout_s)
        line = found()
        assert line is not None, f"no {fields} in the log:\n{self.log}"
        return line

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def said(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end, and the exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        if self.process.stderr is not None:
            self.process.stderr.close()


@contextmanager
def neuron(
    folder: Path,
    toml: str = "",
    *,
    args: Sequence[str] = (),
    module: str = "helexa.neuron",
    env: dict[str, str] | None = None,
) -> Iterator[Daemon]:
    """`neuron serve --port 0` with this neuron.toml and folders of its own, ready."""
    config = folder / "neuron.toml"
    config.write_text(toml)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NEURON_", "CORTEX_", "HF_"))}
    # a socket's path may have 107 bytes, and pytest's folders have long names
    with tempfile.TemporaryDirectory(prefix="helexa-test-") as runtime:
        clean |= {"PYTHONPATH": OURS, "HF_HOME": str(folder / "hf"), "CACHE_DIRECTORY": str(folder / "cache")}
        clean |= {"XDG_RUNTIME_DIR": runtime} | (env or {})
        daemon = Daemon(["-m", module, "serve", "--config", str(config), "--port", "0", *args], clean)
        daemon.runtime = Path(runtime)
        try:
            daemon.wait_for(event="ready")
            yield daemon
        finally:
            daemon.close()


class Events:
    """GET /events, read by a thread; waits for the event that fits. seen: when each came, and what it said."""

    def __init__(self, daemon: Daemon) -> None:
        self.seen: list[tuple[float, dict[str, Any]]] = []
        self._news = threading.Condition()
        self._http = Http(daemon.url, timeout_s=10)  # comments come more often
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Events:
        self._thread.start()
        self.wait_for(type="snapshot")
        return self

    def __exit__(self, *_: object) -> None:
        pass  # the thread ends with the daemon

    def wait_for(self, *, after: int = -1, **fields: Any) -> tuple[float, dict[str, Any]]:
        """The first event with these fields and a number above `after`, and when it came."""

        def found() -> tuple[float, dict[str, Any]] | None:
            return next((it for it in self.seen if it[1]["seq"] > after and fields.items() <= it[1].items()), None)

        with self._news:
            self._news.wait_for(lambda: found() is not None, 30)
            it = found()
        assert it is not None, f"no {fields} in {self.seen}"
        return it

    def ended(self) -> bool:
        """The daemon ended the stream, within some seconds."""
        self._thread.join(10)
        return not self._thread.is_alive()

    def _read(self) -> None:
        try:
            with self._http.stream("GET", "/events") as response:
                for event in response.events():
                    with self._news:
                        self.seen.append((time.monotonic(), event))
                        self._news.notify_all()
        except (OSError, HTTPException):
            pass  # the daemon's end
