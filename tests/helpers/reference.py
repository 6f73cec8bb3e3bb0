"""The pages of docs/reference, as far as tests hold them to the code."""

from __future__ import annotations

import re
from pathlib import Path

_PAGES = Path(__file__).parents[2] / "docs/reference"


def listed(page: str, heading: str) -> set[str]:
    """Code in the first column of the table under a heading of a page."""
    section = (_PAGES / page).read_text().split(f"## {heading}\n", 1)[1].split("\n#", 1)[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)}
