"""The files in config/ are complete, and load as they are and with every key that they show put in."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from helexa.core import config
from helexa.core.catalogue import Catalogue, ModelProfile, load_catalogue
from helexa.core.config import CortexSettings, NeuronSettings, load_cortex, load_neuron
from helexa.core.settings_file import list_item, struct_of

CONFIG = Path(__file__).parents[2] / "config"
KEY = re.compile(r"^(?:# )?(\w+) = ", re.MULTILINE)
LEFT_OUT = re.compile(r"^# (\w+ = .+|\[\[?\w+\]\]?)$", re.MULTILINE)


def refuse(message: str) -> None:
    raise AssertionError(message)


def keys(schema: type[msgspec.Struct]) -> set[str]:
    """Every key of a file: plain ones, and those of its tables."""
    found: set[str] = set()
    for field in msgspec.structs.fields(schema):
        below = struct_of(field.type) or (struct_of(list_item(field.type)) if list_item(field.type) else None)
        if below is None or below is config.Bounds:  # written in one line
            found.add(field.name)
        elif below is not config.LoadRequest:  # shown whole in models.example.toml
            found |= keys(below)
    return found


def test_the_example_of_each_program_gives_the_defaults() -> None:
    assert load_cortex(CONFIG / "cortex.example.toml", {}, warn=refuse) == CortexSettings()
    assert load_neuron(CONFIG / "neuron.example.toml", {}, warn=refuse) == NeuronSettings()


def test_the_example_catalogue_loads() -> None:
    catalogue = load_catalogue(CONFIG / "models.example.toml", warn=refuse)
    assert catalogue.aliases["small"] == catalogue.models[0].id


@pytest.mark.parametrize(
    ("name", "schema"),
    [("cortex", CortexSettings), ("neuron", NeuronSettings), ("models", ModelProfile)],
)
def test_an_example_shows_every_key_there_is(name: str, schema: type[msgspec.Struct]) -> None:
    shown = set(KEY.findall((CONFIG / f"{name}.example.toml").read_text()))
    assert keys(schema) - shown == set()


def test_the_keys_that_the_examples_leave_out_load_as_they_are_shown(tmp_path: Path) -> None:
    for name in ("cortex", "neuron", "models"):
        text = LEFT_OUT.sub(r"\1", (CONFIG / f"{name}.example.toml").read_text())
        (tmp_path / f"{name}.toml").write_text(text)
    heard: list[str] = []
    cortex = load_cortex(tmp_path / "cortex.toml", {}, warn=heard.append)
    assert (len(cortex.neurons), cortex.timeouts.first_byte_s) == (1, 600)
    assert len(load_neuron(tmp_path / "neuron.toml", {}, warn=refuse).default_models) == 1
    catalogue = load_catalogue(tmp_path / "models.toml", warn=heard.append)
    assert all("does not act on it" in warning for warning in heard)
    assert isinstance(catalogue, Catalogue)
    left_out = [f for f in ModelProfile.__struct_fields__ if getattr(catalogue.models[0], f) is None]
    assert left_out == []
