"""tools/check_docs.py: that it finds what it is there to find. Whether the documentation is well, `make check` says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_docs.py"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, looking at pages under tmp_path."""
    spec = importlib.util.spec_from_file_location("check_docs", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(module, "PAGES", [])
    return module


def page(tool: ModuleType, name: str, text: str) -> Path:
    path: Path = tool.ROOT / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    tool.PAGES.append(path)
    return path


def test_a_link_to_a_page_or_heading_that_is_not_there_is_told_with_its_line(tool: ModuleType) -> None:
    page(tool, "docs/a.md", "# A\n\n[b](b.md), [its part](b.md#the-part), [no](c.md), [nor](b.md#part), [me](#a)\n")
    page(tool, "docs/b.md", "# B\n\n## The `part`\n\n[a](a.md) [web](https://example.org/x)\n")
    assert list(tool.check_links()) == [
        "docs/a.md:3: the link to c.md leads nowhere",
        "docs/a.md:3: b.md has no heading #part",
    ]


def test_links_in_code_are_no_links(tool: ModuleType) -> None:
    page(tool, "docs/a.md", "`[x](nowhere.md)`\n\n```\n[y](nowhere.md)\n# no heading\n```\n")
    assert list(tool.check_links()) == []
    assert tool.anchors(tool.PAGES[0]) == set()


def test_a_page_that_no_other_links_to_is_told(tool: ModuleType) -> None:
    page(tool, "docs/a.md", "[b](b.md)\n")
    page(tool, "docs/b.md", "nothing\n")
    assert list(tool.check_that_pages_are_reached()) == ["docs/a.md: no other page links to it"]


def test_what_is_missing_unknown_or_different_is_told(tool: ModuleType) -> None:
    path = page(
        tool,
        "docs/s.md",
        "## f\n\n### [t]\n\n| key | default | meaning |\n|---|---|---|\n| `same` | 1 | it |\n| `other` | 2 | it |\n"
        "| `gone` | 3 | it |\n| `mute` | 4 | |\n\n## Elsewhere\n\n| `any` | thing |\n",
    )
    at = "f > [t]"
    expected = {(at, "same"): ["1"], (at, "other"): ["5"], (at, "mute"): ["4"], (at, "new"): ["6"]}
    assert list(tool.compare(path, expected, "setting")) == [
        "docs/s.md:8: `other` says ['2']; the code says ['5']",
        "docs/s.md:9: `gone` (f > [t]) is no setting that the code knows",
        "docs/s.md:10: `mute` needs 1 columns and its meaning",
        "docs/s.md: under 'f > [t]' the setting is missing: | `new` | 6 | ... |",
    ]
