"""Settings files and their overrides: what is taken, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helexa.core import config
from helexa.core.config import ConfigError, CortexSettings, NeuronSettings, find_catalogue, load_cortex, load_neuron

CORTEX_OF_AN_EXISTING_USER = """
[gateway]
listen = "0.0.0.0:31313"
metrics_listen = "0.0.0.0:31314"
models_config = "/etc/cortex/models.toml" # left out: models.toml beside this file, if there is one

[eviction]
strategy = "lru"            # lru | priority | adaptive (ours, when the key is absent)
defrag_after_cycles = 50

[[neurons]]
name = "beast"
endpoint = "http://beast.internal:13131"
"""

NEURON_AS_DOCUMENTED = """
host = "0.0.0.0"
port = 13131
models_dir = "/var/lib/helexa/models"     # each GGUF file and each model folder below it can be served
isolation = "process"                     # process | none
memory_limit_mb = [8000]                  # per device; left out: what the device has
allow_downloads = true

[[default_models]]                        # a load request, made at start without holding up the API
model_id = "smollm2"
source = "/srv/smollm2.gguf"              # a file, a folder, or "owner/repo"; left out: model_id is looked up
"""


def refuse(message: str) -> None:
    raise AssertionError(f"warned: {message}")


def cortex(tmp_path: Path, text: str, env: dict[str, str] | None = None) -> CortexSettings:
    path = tmp_path / "cortex.toml"
    path.write_text(text)
    return load_cortex(path, env or {}, warn=refuse)


def neuron(tmp_path: Path, text: str, env: dict[str, str] | None = None) -> NeuronSettings:
    path = tmp_path / "neuron.toml"
    path.write_text(text)
    return load_neuron(path, env or {}, warn=refuse)


def told(tmp_path: Path, text: str, program: str = "cortex", env: dict[str, str] | None = None) -> str:
    load = cortex if program == "cortex" else neuron
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, env)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_the_files_of_existing_users_load_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text(CORTEX_OF_AN_EXISTING_USER)
    heard: list[str] = []
    gateway = load_cortex(path, {}, warn=heard.append)
    assert heard == []
    assert gateway.gateway.models_config == "/etc/cortex/models.toml"
    assert (gateway.eviction.strategy, gateway.eviction.defrag_after_cycles) == ("lru", 50)
    assert [(n.name, n.endpoint, n.token) for n in gateway.neurons] == [("beast", "http://beast.internal:13131", None)]
    node = neuron(tmp_path, NEURON_AS_DOCUMENTED)
    assert (node.host, node.port, node.memory_limit_mb) == ("0.0.0.0", 13131, [8000])
    assert (node.default_models[0].id, node.default_models[0].source) == ("smollm2", "/srv/smollm2.gguf")


def test_without_a_file_both_programs_listen_on_loopback_only() -> None:
    gateway = load_cortex(None, {}, warn=refuse)
    assert config.is_loopback(config.split_listen(gateway.gateway.listen)[0])
    assert config.is_loopback(config.split_listen(gateway.gateway.metrics_listen)[0])
    assert config.is_loopback(load_neuron(None, {}, warn=refuse).host)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gateway]\nlistn = 'x'", "cortex.toml: [gateway] listn is not a known key; did you mean 'listen'?"),
        ("listen = 'x'", "cortex.toml: listen is not a known key; did you mean '[gateway] listen'?"),
        ("[gateway]\ndrain_s = 1", "cortex.toml: [gateway] drain_s is not a known key here; it stands above"),
        ("[gatway]\nx = 1", "cortex.toml: [gatway] is not a known key; did you mean 'gateway'?"),
        ("[gateway]\nzzz = 1", "known here: listen, metrics_listen, metrics_on_api"),
        ("gateway = 3", "cortex.toml: gateway must be a table, not 3"),
        ("neurons = 3", "cortex.toml: neurons must be a list, each a table, not 3"),
        ("[gateway]\nbody_limit_mb = -1", "[gateway] body_limit_mb must be a whole number from 1 to 4,096, not -1"),
        ("[gateway]\nbody_limit_mb = true", "[gateway] body_limit_mb must be a whole number from 1 to 4,096, not true"),
        ("[gateway]\nmetrics_on_api = 1", "[gateway] metrics_on_api must be true or false, not 1"),
        ("[gateway]\nlisten = 31313", "[gateway] listen must be a text that is not empty, not 31313"),
        ("[gateway]\nlisten = '127.0.0.1'", "[gateway] listen must be host:port with a port from 0 to 65,535"),
        ("[gateway]\nlisten = '127.0.0.1:99999'", "[gateway] listen must be host:port with a port from 0 to 65,535"),
        ("[gateway]\nlisten = ':31313'", '[gateway] listen has no host; "0.0.0.0:31313" listens on every address'),
        (
            "[gateway]\nlisten = '::1:31313'",
            '[gateway] listen has an IPv6 address without brackets; write "[::1]:31313"',
        ),
        ("[gateway]\nlisten = '300.1.1.1:80'", "[gateway] listen has no usable host"),
        ("[gateway]\nlisten = 'a:1'\nmetrics_listen = 'a:1'", "[gateway] metrics_listen is the same as listen"),
        ("[gateway]\ncors_origins = ['http://a/b']", "[gateway] cors_origins[0] must be"),
        ("[gateway]\ncors_origins = 'http://a'", "[gateway] cors_origins must be a list"),
        ("[responses]\npath = 'kept.sqlite'", "[responses] path must be a whole path"),
        (
            "[eviction]\nstrategy = 'lur'",
            '[eviction] strategy must be one of "lru", "priority", "adaptive", not "lur"; did',
        ),
        ("[timeouts]\nstall_s = 0", "[timeouts] stall_s must be a number, more than 0 and at most 604,800, not 0"),
        ("[timeouts]\nstall_s = nan", "[timeouts] stall_s must be a number"),
        ("[timeouts]\nstall_s = inf", "[timeouts] stall_s must be a number"),
        ("[timeouts]\nstall_s = 2024-01-01", "[timeouts] stall_s must be a number"),
        ("[limits]\nconnections = 0", "[limits] connections must be a whole number from 1"),
        ("drain_s = -1", "cortex.toml: drain_s must be a number from 0 to 86,400, not -1"),
        ("[[neurons]]\nname = 'a'", '[[neurons]] "a" endpoint is missing; it must be a text'),
        ("[[neurons]]\nendpoint = 'http://a'", "[[neurons]] #1 name is missing"),
        ("[[neurons]]\nname = 'a b'\nendpoint = 'http://a'", '[[neurons]] "a b" name must be at most 63 letters'),
        ("[[neurons]]\nname = 'a'\nendpoint = 'a:13131'", '[[neurons]] "a" endpoint must be like "http://beast'),
        ("[[neurons]]\nname = 'a'\nendpoint = 'https://a'", '[[neurons]] "a" endpoint must begin with http://'),
        ("[[neurons]]\nname = 'a'\nendpoint = 'http://a:0'", "port 0 cannot be connected to"),
        ("[[neurons]]\nname = 'a'\nendpoint = 'http://a:99999'", '[[neurons]] "a" endpoint must be like'),
        ("[[neurons]]\nname = 'a'\nendpoint = 'http://u:p@a'", "without user, query or fragment"),
        ("[[neurons]]\nname = 'a'\nendpoint = 'unix:x.sock'", "must name a socket by its whole path"),
        (
            "[[neurons]]\nname = 'a'\nendpoint = 'http://a'\n[[neurons]]\nname = 'a'\nendpoint = 'http://b'",
            '[[neurons]] "a" name is used twice (entries 1 and 2)',
        ),
        (
            "[[neurons]]\nname = 'a'\nendpoint = 'http://a:1'\n[[neurons]]\nname = 'b'\nendpoint = 'http://A:1/'",
            '[[neurons]] "b" endpoint is the endpoint of "a" too',
        ),
        ("[gateway\n", "cortex.toml: is not TOML: "),
        ("a = " + "[" * 3000, "cortex.toml: is not TOML: "),
        ("a = " + "9" * 5000, "cortex.toml: is not TOML: "),
    ],
)
def test_each_mistake_in_cortex_toml_is_named_with_its_key_and_what_would_be_right(
    tmp_path: Path, text: str, message: str
) -> None:
    assert message in told(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = 65536", "neuron.toml: port must be a whole number from 0 to 65,535, not 65536"),
        ("port = '13131'", 'neuron.toml: port must be a whole number from 0 to 65,535, not "13131"'),
        ("host = '0.0.0.0:13131'", "neuron.toml: host must be an address or a name"),
        ("isolation = 'proces'", 'isolation must be one of "process", "none", not "proces"; did you mean \'process\'?'),
        ("memory_limit_mb = [0]", "memory_limit_mb[0] must be a whole number, at least 1"),
        ("memory_limit_mb = 8000", "memory_limit_mb must be a list, each a whole number"),
        ("gguf_owners = ['a/b']", "gguf_owners[0] must be the name of a Hub account, without a slash"),
        ("token = 'a b'", "token must be printable ASCII without spaces"),
        ("token = ''", "token must be a text that is not empty"),
        ("[[default_models]]\nsource = 'x'", "[[default_models]] #1 model_id is missing or empty"),
        (
            "[[default_models]]\nmodel_id = 'x'\nslots = 0",
            '[[default_models]] "x" slots must be a whole number, at least 1',
        ),
        ("[[default_models]]\nmodel_id = 'x'\nquant = ''", '[[default_models]] "x" quant is empty'),
        ("[[default_models]]\nmodel_id = 'x'\nmodel = 'y'", '[[default_models]] "x" model names another model'),
        ("[[default_models]]\nmodel_id = 'x'\n[[default_models]]\nmodel = 'x'", "is loaded twice (entries 1 and 2)"),
        ("[[default_models]]\nmodel_id = 'x'\ndevices = [1, 1]", "devices names a device twice"),
        ("[[default_models]]\nmodel_id = 'x'\ndevices = [-1]", "devices[0] must be a whole number, at least 0"),
        ("[[default_models]]\nmodel_id = 'x'\ncontxt = 1", "contxt is not a known key; did you mean 'context'?"),
    ],
)
def test_each_mistake_in_neuron_toml_is_named_with_its_key_and_what_would_be_right(
    tmp_path: Path, text: str, message: str
) -> None:
    assert message in told(tmp_path, text, "neuron")


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    lines = told(tmp_path, "[gateway]\nlistn = 'x'\nbody_limit_mb = 0\n[eviction]\nstrategy = 'x'").splitlines()
    assert len(lines) == 3


def test_a_file_that_is_absent_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: there is no such file"):
        load_cortex(tmp_path / "absent.toml", {}, warn=refuse)
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.toml: is not UTF-8 \(byte 2\)"):
        load_cortex(tmp_path / "latin.toml", {}, warn=refuse)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cortex(tmp_path, {}, warn=refuse)


def test_old_keys_are_taken_with_one_warning_that_names_them(tmp_path: Path) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text(
        "limit = 4\nmodels_config = 'x'\n[entitlements]\na = 1\n[upstream]\nb = 2\n"
        "[[neurons]]\nname = 'a'\nendpoint = 'http://a'\nlimit = 2\n"
    )
    heard: list[str] = []
    settings = load_cortex(path, {}, warn=heard.append)
    assert [n.name for n in settings.neurons] == ["a"]
    assert settings.gateway.models_config is None
    (warning,) = heard
    for named in ("`limit`", "`models_config`", "`[entitlements]`", "`[upstream]`", '`[[neurons]] "a" limit`'):
        assert named in warning


def test_a_token_is_never_shown_back(tmp_path: Path) -> None:
    assert "s3cret" not in told(tmp_path, "[[neurons]]\nname = 'a'\nendpoint = 'http://a'\ntoken = ['s3cret']")
    assert "s3cret" not in told(tmp_path, "", env={"CORTEX_NEURONS": '[{"token": "s3cret"'})
    assert "s3cret" not in told(
        tmp_path, "", env={"CORTEX_NEURONS": '[{"name":"a","endpoint":"b","token":"s3cret x"}]'}
    )
    assert "s3cret" not in told(tmp_path, "token = 's3cret '", "neuron")


# --- the environment


def test_the_environment_overrides_the_file_key_by_key(tmp_path: Path) -> None:
    env = {
        "CORTEX_GATEWAY__LISTEN": "127.0.0.1:1",
        "CORTEX_DRAIN_S": "1.5",
        "CORTEX_GATEWAY__METRICS_ON_API": "true",
        "CORTEX_GATEWAY__CORS_ORIGINS": "https://a, https://b",
        "CORTEX_NEURONS__0__TOKEN": "secret",
        "CORTEX_URL": "http://elsewhere:1",  # the command line's, not a setting
        "HOME": "/root",
    }
    path = tmp_path / "cortex.toml"
    path.write_text(CORTEX_OF_AN_EXISTING_USER)
    settings = load_cortex(path, env, warn=lambda message: None)
    assert settings.gateway.listen == "127.0.0.1:1"
    assert settings.gateway.metrics_listen == "0.0.0.0:31314"
    assert settings.drain_s == 1.5
    assert settings.gateway.metrics_on_api is True
    assert settings.gateway.cors_origins == ["https://a", "https://b"]
    assert settings.neurons[0].token == "secret"


def test_lists_and_tables_come_from_the_environment_as_json() -> None:
    nodes = '[{"name": "a", "endpoint": "http://a:1"}]'
    settings = load_cortex(None, {"CORTEX_NEURONS": nodes, "CORTEX_NEURONS__0__NAME": "b"}, warn=refuse)
    assert settings.neurons[0].name == "b"
    models = '[{"model_id": "m", "source": "/m.gguf", "lora": ["/a.gguf"]}]'
    env = {
        "NEURON_DEFAULT_MODELS": models,
        "NEURON_MEMORY_LIMIT_MB": "8000,9000",
        "NEURON_DEFAULT_MODELS__0__SLOTS": "2",
    }
    node = load_neuron(None, env, warn=refuse)
    assert node.memory_limit_mb == [8000, 9000]
    assert (node.default_models[0].slots, node.default_models[0].lora) == (2, ["/a.gguf"])


def test_an_empty_variable_leaves_an_optional_key_out(tmp_path: Path) -> None:
    node = neuron(tmp_path, "token = 'x'\nmodels_dir = '/m'", {"NEURON_TOKEN": "", "NEURON_MODELS_DIR": ""})
    assert (node.token, node.models_dir) == (None, None)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"CORTEX_GATEWAY__LISTN": "x"},
            "environment: CORTEX_GATEWAY__LISTN is not a known setting; did you mean 'CORTEX_GATEWAY__LI",
        ),
        ({"CORTEX_GATEWAY__LISTEN": "x"}, "environment: CORTEX_GATEWAY__LISTEN must be host:port"),
        (
            {"CORTEX_GATEWAY__BODY_LIMIT_MB": "many"},
            'CORTEX_GATEWAY__BODY_LIMIT_MB must be a whole number from 1 to 4,096, not "many"',
        ),
        (
            {"CORTEX_GATEWAY__BODY_LIMIT_MB": ""},
            'CORTEX_GATEWAY__BODY_LIMIT_MB must be a whole number from 1 to 4,096, not ""',
        ),
        ({"CORTEX_GATEWAY__METRICS_ON_API": "maybe"}, "must be true or false"),
        ({"CORTEX_EVICTION__STRATEGY": "lur"}, "did you mean 'lru'?"),
        ({"CORTEX_DRAIN_S": "inf"}, "CORTEX_DRAIN_S must be a number from 0 to 86,400"),
        ({"CORTEX_DRAIN_S__X": "1"}, "CORTEX_DRAIN_S__X goes into a value that has no keys below it"),
        ({"CORTEX_NEURONS__0__NAME": "x"}, "CORTEX_NEURONS__0__NAME names entry 0 of a list of 0"),
        ({"CORTEX_": "x"}, "environment: CORTEX_ is not a known setting"),
        (
            {"CORTEX_NEURONS": '[{"name": "a", "endpoint": "x"}]'},
            "environment: CORTEX_NEURONS [0].endpoint must be like",
        ),
    ],
)
def test_a_bad_override_is_named_by_its_variable(tmp_path: Path, env: dict[str, str], message: str) -> None:
    assert message in told(tmp_path, "", env=env)


# --- properties

_SECTIONS = (CortexSettings, NeuronSettings, config.Gateway, config.Timeouts, config.Limits, config.NeuronEntry)
_KEYS = sorted({name for section in _SECTIONS for name in section.__struct_fields__})
_LEAVES = st.one_of(
    st.booleans(),
    st.integers(min_value=-(2**63), max_value=2**63 - 1),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["127.0.0.1:1", "http://a:1", "lru", "a"]),
)
_NAMES = st.one_of(st.sampled_from(_KEYS), st.text(max_size=6))
_TREES = st.dictionaries(
    _NAMES,
    st.recursive(
        _LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_NAMES, inner, max_size=4))
    ),
    max_size=5,
)


def toml(value: Any) -> str:
    """A value in TOML's inline form; JSON's escapes of a text are TOML's too."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return key(value) if isinstance(value, str) else repr(value)


def key(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


@given(tree=_TREES)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_toml_loads_or_is_refused_with_a_key_that_is_in_it(tmp_path: Path, tree: dict[str, Any]) -> None:
    path = tmp_path / "any.toml"
    path.write_text("".join(f"{key(k)} = {toml(v)}\n" for k, v in tree.items()), "utf-8")
    for load in (load_cortex, load_neuron):
        try:
            load(path, {}, warn=lambda message: None)
            continue
        except ConfigError as error:
            problems = error.problems
        assert problems
        assert all(p.file == str(path) and p.key and p.reason for p in problems)


_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "gateway.listen": st.builds("127.0.0.1:{}".format, st.integers(0, 65535)),
    "gateway.metrics_on_api": st.booleans(),
    "gateway.body_limit_mb": st.integers(1, 4096),
    "gateway.cors_origins": st.lists(st.sampled_from(["*", "https://a", "http://b:8080"]), max_size=3),
    "eviction.strategy": st.sampled_from(["lru", "priority", "adaptive"]),
    "timeouts.stall_s": st.floats(0.001, 604_800),
    "timeouts.first_byte_s": st.floats(0.001, 604_800),
    "limits.connections": st.integers(1, 10_000_000),
    "loading.queue": st.integers(1, 10_000_000),
    "drain_s": st.floats(0, 86_400),
    "neurons": st.lists(
        st.fixed_dictionaries({"name": st.sampled_from(["a", "b"]), "token": st.text("xyz", min_size=1)}), max_size=1
    ).map(lambda entries: [{**e, "endpoint": "http://a:1"} for e in entries]),
}


@pytest.mark.parametrize("dotted", _VALUES)
@given(data=st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_an_override_equals_the_same_value_in_the_file(tmp_path: Path, dotted: str, data: st.DataObject) -> None:
    value = data.draw(_VALUES[dotted])
    section, _, name = dotted.rpartition(".")
    written = f"[{section}]\n{name} = {toml(value)}" if section else f"{name} = {toml(value)}"
    variable = "CORTEX_" + dotted.upper().replace(".", "__")
    text = value if isinstance(value, str) else json.dumps(value)
    path, nothing = tmp_path / "value.toml", tmp_path / "empty.toml"
    path.write_text(written)
    nothing.touch()

    def loaded(path: Path, env: dict[str, str]) -> CortexSettings:
        return load_cortex(path, env, warn=lambda message: None)

    assert loaded(path, {}) == loaded(nothing, {variable: text})
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        assert loaded(path, {}) == loaded(nothing, {variable: ",".join(value)})


# --- where the catalogue is


def test_the_catalogue_is_the_named_file_or_the_one_beside(tmp_path: Path) -> None:
    path = tmp_path / "cortex.toml"
    assert find_catalogue(CortexSettings(), path) is None
    (tmp_path / "models.toml").touch()
    assert find_catalogue(CortexSettings(), path) == tmp_path / "models.toml"
    assert find_catalogue(CortexSettings(), None) is None
    (tmp_path / "other.toml").touch()
    named = CortexSettings(gateway=config.Gateway(models_config="other.toml"))
    assert find_catalogue(named, path) == tmp_path / "other.toml"


def test_a_named_catalogue_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    named = CortexSettings(gateway=config.Gateway(models_config="other.toml"))
    with pytest.raises(ConfigError, match=r"cortex\.toml: \[gateway\] models_config names .*other\.toml, which is not"):
        find_catalogue(named, tmp_path / "cortex.toml")
