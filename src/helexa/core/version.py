"""Which version of helexa runs, and from which commit, for GET /version and `--version`."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from helexa import __version__


def commit() -> str | None:
    """$HELEXA_COMMIT as a package's build sets it, else what the source checkout is at; None where neither is known."""
    if given := os.environ.get("HELEXA_COMMIT"):
        return given
    git = Path(__file__).resolve().parents[3] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        ref = git / name
        if ref.exists():
            return ref.read_text().strip()
        packed = (git / "packed-refs").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)


def describe() -> dict[str, str | None]:
    """The members of GET /version that both programs have."""
    return {"version": __version__, "commit": commit(), "python": platform.python_version()}
