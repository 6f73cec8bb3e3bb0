from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from helexa.core.catalogue import Catalogue, ModelProfile
from helexa.core.config import CortexSettings, NeuronEntry
from helexa.cortex.client import CommandFailed
from helexa.cortex.simulate import svg
from helexa.cortex.simulate.command import Load, simulate
from helexa.cortex.simulate.described import parse_node
from helexa.cortex.simulate.world import NodeSpec

CATALOGUE = Catalogue(
    models=[ModelProfile(id="large", vram_mb=20_000), ModelProfile(id="small", vram_mb=5_000)], aliases={"s": "small"}
)
SETTINGS = CortexSettings()


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("24GB", NodeSpec("added1", [24_576], 2048.0)),
        ("beast=24GB+12gb@3", NodeSpec("beast", [24_576, 12_288], 3072.0)),
        ("benjy=8000MB", NodeSpec("benjy", [8_000], 2048.0)),
    ],
)
def test_a_node_is_described_in_one_word(text: str, node: NodeSpec) -> None:
    assert parse_node(text, 1) == node


@pytest.mark.parametrize("text", ["", "beast", "24TB", "24GB@", "24GB@0", "=24GB", "0GB", "24GB++12GB", "24GB@nan"])
def test_what_describes_no_node_is_refused_with_what_would(text: str) -> None:
    with pytest.raises(CommandFailed, match="use 24GB") as raised:
        parse_node(text, 1)
    assert raised.value.code == 2


def written(path: Path, *asked: tuple[float, str]) -> Load:
    path.write_text("".join(json.dumps({"t": t, "model": m, "output_tokens": 50}) + "\n" for t, m in asked))
    return Load(path)


def test_a_larger_fleet_stands_beside_the_one_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = written(tmp_path / "t.jsonl", *[(60.0 * i, "large" if i % 2 else "s") for i in range(40)])
    simulate(SETTINGS, CATALOGUE, load, described=["n=24GB"], added=["24GB"], as_json=True)
    alone, larger = json.loads(capsys.readouterr().out)
    assert (alone["name"], larger["name"]) == ("as it is", "+ 24GB")
    assert (alone["cold_starts"], larger["cold_starts"]) == (40, 2)
    assert [n["name"] for n in larger["nodes"]] == ["n", "added1"]


def test_the_table_and_the_picture_show_each_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "out.svg"
    load = Load(rate=0.05, hours=2)
    simulate(SETTINGS, CATALOGUE, load, described=["n=24GB", "m=8GB"], compare=True, picture=picture)
    shown = capsys.readouterr().out
    for words in (
        "as it is, adaptive",
        "as it is, lru",
        "as it is, clairvoyant",
        "least in order",
        "best fit",
        "cold starts",
        "p99",
    ):
        assert words in shown
    root = ElementTree.fromstring(picture.read_text())
    assert root.tag.endswith("svg")
    assert "Memory in use, as it is, lru" in picture.read_text()


def test_beside_the_policies_stands_what_none_of_them_can_come_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy", reason="the bound is a linear programme")
    load = written(tmp_path / "t.jsonl", *[(600.0 * i, "large" if i % 2 else "small") for i in range(40)])
    simulate(SETTINGS, CATALOGUE, load, described=["n=24GB"], added=["24GB"], compare=True, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    least = {row["name"]: row["cold_starts"] for row in rows if row.get("is_bound")}
    assert least == {"as it is, least in order": 40, "+ 24GB, least in order": 2}
    known = [row["cold_starts"] for row in rows if row["name"].endswith("clairvoyant")]
    assert known == [40, 2]
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    simulate(SETTINGS, CATALOGUE, load, described=["n=24GB"], compare=True)
    shown = capsys.readouterr()
    assert "least in order" not in shown.out
    assert shown.err == "cortex: no bound: the bound needs scipy: pip install scipy\n"


def test_models_that_the_catalogue_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="does not name: other"):
        simulate(SETTINGS, CATALOGUE, written(tmp_path / "t.jsonl", (0, "other")), described=["24GB"])


def test_a_model_of_unknown_size_is_named() -> None:
    catalogue = Catalogue(models=[ModelProfile(id="riddle")])
    with pytest.raises(CommandFailed, match="set vram_mb: riddle"):
        simulate(SETTINGS, catalogue, Load(), described=["24GB"])


def test_a_node_that_cannot_be_asked_can_be_described() -> None:
    settings = CortexSettings(neurons=[NeuronEntry(name="beast", endpoint="unix:/nowhere.sock")])
    with pytest.raises(CommandFailed, match="--node beast=24GB"):
        simulate(settings, CATALOGUE, Load(hours=0.1))
    simulate(settings, CATALOGUE, Load(hours=0.1), described=["beast=24GB"], as_json=True)


def test_charts_leave_out_what_their_axes_have_no_place_for() -> None:
    drawn = svg.page([svg.lines("<&>", "x", "y", [svg.Line("a", [(0.0, 1.0), (10.0, 0.0), (10.0, 5.0)])], log_x=True)])
    assert "&lt;&amp;&gt;" in drawn
    ElementTree.fromstring(drawn)
