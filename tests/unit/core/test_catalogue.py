"""models.toml: what is taken, what is refused, and what a name stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from helexa.core.catalogue import Catalogue, load_catalogue
from helexa.core.lifecycle import ServingProfile
from helexa.core.settings_file import ConfigError

OF_AN_EXISTING_USER = """
[[models]]
id = "Qwen/Qwen3-Coder-30B-A3B-Instruct"
harness = "candle"
quant = "Q4_K_M"
vram_mb = 19000
min_devices = 2
min_device_vram_mb = 10000
pinned_on = ["beast"]

[aliases]
"small" = "Qwen/Qwen3-1.7B"
"""


def load(tmp_path: Path, text: str, warn: list[str] | None = None) -> Catalogue:
    path = tmp_path / "models.toml"
    path.write_text(text, "utf-8")
    heard: list[str] = []
    catalogue = load_catalogue(path, warn=heard.append if warn is None else warn.append)
    assert not heard
    return catalogue


def test_the_file_of_an_existing_user_loads_unchanged(tmp_path: Path) -> None:
    heard: list[str] = []
    catalogue = load(tmp_path, OF_AN_EXISTING_USER, heard)
    assert heard == []
    (model,) = catalogue.models
    assert (model.harness, model.quant, model.vram_mb, model.min_devices) == ("candle", "Q4_K_M", 19000, 2)
    assert (model.min_device_vram_mb, model.pinned_on) == (10000, ["beast"])
    assert catalogue.aliases == {"small": "Qwen/Qwen3-1.7B"}


def test_a_node_is_asked_with_the_whole_profile_and_not_with_the_gateways_wishes(tmp_path: Path) -> None:
    catalogue = load(
        tmp_path, "[[models]]\nid = 'm'\nslots = 2\nkv_cache = 'q8_0'\ncost = { prompt = 1 }\npinned_on = ['a']"
    )
    request = catalogue.models[0].load_request()
    assert (request.id, request.slots, request.kv_cache) == ("m", 2, "q8_0")
    assert set(ServingProfile.__struct_fields__) <= set(type(request).__struct_fields__)
    assert not hasattr(request, "pinned_on")


def test_an_old_key_of_a_model_is_taken_with_a_warning(tmp_path: Path) -> None:
    heard: list[str] = []
    load(tmp_path, "[[models]]\nid = 'm'\nlimit = { context = 1 }", heard)
    assert len(heard) == 1
    assert '[[models]] "m" limit' in heard[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[models]]\nquant = 'Q8_0'", "models.toml: [[models]] #1 id is missing"),
        ("[[models]]\nid = ''", "[[models]] #1 id is missing or empty"),
        ('[[models]]\nid = "a\\n"', "id must be printable text without spaces around it"),
        ("[[models]]\nid = 'm'\n[[models]]\nid = 'm'", '[[models]] "m" id is described twice (entries 1 and 2)'),
        ("[[models]]\nid = 'm'\nslots = 0", '[[models]] "m" slots must be a whole number, at least 1'),
        ("[[models]]\nid = 'm'\ncontext = -1", "context must be a whole number, at least 1"),
        ("[[models]]\nid = 'm'\nharness = 'lama'", "did you mean 'llama'?"),
        ("[[models]]\nid = 'm'\nkv_cache = 'q8'", "did you mean 'q8_0'?"),
        ("[[models]]\nid = 'm'\ntask = 'chatt'", "did you mean 'chat'?"),
        ("[[models]]\nid = 'm'\ndevices = []", "devices is empty"),
        ("[[models]]\nid = 'm'\ndevices = [0, 0]", "devices names a device twice: [0, 0]"),
        ("[[models]]\nid = 'm'\ndevices = [0, 1]\ntensor_parallel = 3", "devices names 2 for tensor_parallel = 3"),
        ("[[models]]\nid = 'm'\ndevices = [0, 1]\nshares = [1.0]", "shares has 1 values for 2 devices"),
        ("[[models]]\nid = 'm'\nshares = [-1.0]", "shares[0] must be a number from 0"),
        ("[[models]]\nid = 'm'\nshares = [1.0]", "shares needs devices or tensor_parallel, one share for each"),
        ("[[models]]\nid = 'm'\ntensor_parallel = 2\nshares = [1.0]", "shares has 1 values for tensor_parallel = 2"),
        ("[[models]]\nid = 'm'\ndevices = [0]\nshares = [0.0]", "shares gives no device anything"),
        ("[[models]]\nid = 'm'\nttl_s = 0", "ttl_s must be a number, more than 0"),
        ("[[models]]\nid = 'm'\nmax_replicas = 0", "max_replicas must be a whole number from 1"),
        (
            "[[models]]\nid = 'm'\ncost = { prompt = -1 }",
            "cost.prompt must be a number from 0 to 1,000,000,000, not -1",
        ),
        ("[[models]]\nid = 'm'\npinned_on = ['a', 'a']", "pinned_on has an empty or a repeated node"),
        ("[[models]]\nid = 'm'\nlora = ['a', 'a']", "lora has an empty or a repeated entry"),
        ("[[models]]\nid = 'm'\npined_on = ['a']", "did you mean 'pinned_on'?"),
        ("[models]\nid = 'm'", "[models] must be a list, each a table, not a table"),
        ("[aliases]\na = 1", "[aliases] a must be a text or a list, each a text, not 1"),
        ("[aliases]\na = ['b', 1]", "[aliases] a must be a text or a list, each a text, not ['b', 1]"),
        ("[aliases]\na = 'a'", "[aliases] a leads back to itself: a -> a"),
        ("[aliases]\na = 'b'\nb = 'a'", "[aliases] a leads back to itself: a -> b -> a"),
        ("[aliases]\na = ['x', 'b']\nb = ['y', 'c']\nc = 'a'", "[aliases] b leads back to itself: b -> c -> a -> b"),
        ("[aliases]\na = []", "[aliases] a stands for nothing"),
        ("[aliases]\na = ['b', 'b']", "[aliases] a names a model twice"),
        ("[aliases]\n'a*b*' = 'x'", '[aliases] "a*b*" has more than one "*"'),
        ("[aliases]\na = 'b*'\n'b*' = 'x'", '[aliases] a stands for the pattern "b*"; name a model or an alias'),
        ("[aliases]\na = ''", "[aliases] a is missing or empty"),
        ("[aliases]\nm = 'x'\n[[models]]\nid = 'm'", "[aliases] m is the id of a model too"),
    ],
)
def test_each_mistake_is_named_with_its_key_and_what_would_be_right(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
