"""Programs that people use against a gateway, as the tests run them: from .venv/clients, in a home of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

CLIENTS: Final = Path(os.environ.get("HELEXA_CLIENTS") or Path(__file__).parents[2] / ".venv" / "clients")
RUN_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Ran:
    """What a program left behind when it ended."""

    code: int
    out: str
    err: str


def npm_program(pattern: str) -> Path:
    """The program that this pattern finds below node_modules: names of platforms are left open. Skips the test where
    there is none."""
    for path in sorted((CLIENTS / "node_modules").glob(pattern)):
        if os.access(path, os.X_OK):
            return path
    pytest.skip(f"{pattern} is not installed below {CLIENTS}: `make test` does it where there is npm")


def run_client(
    command: Sequence[str | Path],
    home: Path,
    env: Mapping[str, str],
    *,
    stdin: str = "",
    folder: Path | None = None,
    timeout_s: float = RUN_S,
) -> Ran:
    """In `folder`, or `home`/work, with `home` as its home and nothing of our own environment but PATH."""
    work = folder or home / "work"
    work.mkdir(parents=True, exist_ok=True)
    clean = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "TERM": "dumb", "NO_COLOR": "1", **env}
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=work,
        env=clean,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)
