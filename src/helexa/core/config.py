"""Settings of both programs: TOML plus environment overrides in, typed and checked values out.

The structs are the reference: a key that is not here is refused, with the file, the key and the nearest right one.
`[gateway] listen` is overridden by CORTEX_GATEWAY__LISTEN, `port` by NEURON_PORT; a list is JSON or comma-separated.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from helexa.core import logs, profile, settings_file
from helexa.core.lifecycle import LoadRequest
from helexa.core.settings_file import ConfigError, Fault, Key, Problem

__all__ = ["ConfigError", "CortexSettings", "NeuronSettings", "find_catalogue", "load_cortex", "load_neuron"]

# Variables with our prefixes that are no settings: where the command line finds a gateway, and the files themselves.
CORTEX_VARIABLES = frozenset({"CORTEX_URL", "CORTEX_CONFIG"})
NEURON_VARIABLES = frozenset({"NEURON_CONFIG"})

# Keys of the contract that wait for the part that will act on them. Taken, and told: silence would be a lie.
IDLE = frozenset({("default_models", "vram_mb")})

Seconds = Annotated[float, Meta(gt=0, le=604_800)]  # a week: whoever asks for more has mistaken the unit
Grace = Annotated[float, Meta(ge=0, le=86_400)]
Port = Annotated[int, Meta(ge=0, le=65_535)]  # 0: any free one
BodyMB = Annotated[int, Meta(ge=1, le=4_096)]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Text = Annotated[str, Meta(min_length=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of a settings file."""


class Gateway(Section, frozen=True):
    listen: Text = "127.0.0.1:31313"
    metrics_listen: Text = "127.0.0.1:31314"
    metrics_on_api: bool = False  # /metrics on the API port as well
    models_config: Text | None = None  # left out: models.toml beside this file, if there is one
    watch_files: bool = True  # read this file and models.toml again when they change; SIGHUP always does
    body_limit_mb: BodyMB = 64
    cors_origins: list[Text] = []
    allowed_hosts: list[Text] = []  # public names this gateway is called by; addresses and local names need none


class Timeouts(Section, frozen=True):
    """Seconds. Of a client: head_s, body_min_rate (bytes/s, after 10 s), idle_s. Of a node: the rest."""

    head_s: Seconds = 10
    body_min_rate: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 1000
    idle_s: Seconds = 75
    connect_s: Seconds = 3
    first_byte_s: Seconds | None = None  # none: prefill and load take what they take
    stall_s: Seconds = 120


class Limits(Section, frozen=True):
    connections: Count = 20_000
    connections_per_address: Count = 4_096


class Poll(Section, frozen=True):
    interval_s: Annotated[float, Meta(ge=0.05, le=3_600)] = 2


class Loading(Section, frozen=True):
    wait_s: Seconds = 600
    queue: Count = 256  # waiting requests per model


class Dialects(Section, frozen=True):
    """What becomes of a request that names what only its dialect's own vendor has."""

    hosted_tools: Literal["drop", "refuse"] = "drop"
    keep_changing_blocks: bool = False  # in the prompt: system blocks of clients that change with every request


class Responses(Section, frozen=True):
    """What is kept of /v1/responses for `previous_response_id` and GET."""

    store_mb: Annotated[int, Meta(ge=0, le=1_048_576)] = 64  # what was not used for the longest time goes first
    store_age_s: Seconds = 3600  # since it was used last
    path: Text | None = None  # a SQLite file; left out: in memory


class Trace(Section, frozen=True):
    """A record of what is asked, without its words, for `cortex simulate --trace`."""

    path: Text | None = None  # a whole path; left out: nothing is recorded
    max_mb: Annotated[int, Meta(ge=1, le=1_048_576)] = 100  # then it begins anew, and the old one is kept as path.1


class Eviction(Section, frozen=True):
    strategy: Literal["lru", "priority", "adaptive"] = "adaptive"
    defrag_after_cycles: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 50


class Bounds(Section, frozen=True):
    """How many requests of this gateway a model, or a node, may have at once; left out: as many as come."""

    running: Count | None = None
    waiting: Annotated[int, Meta(ge=0, le=10_000_000)] | None = None


class NeuronEntry(Section, frozen=True):
    name: Text
    endpoint: Text
    token: Text | None = None
    limits: Bounds | None = None


class CortexSettings(Section, frozen=True):
    gateway: Gateway = Gateway()
    eviction: Eviction = Eviction()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    poll: Poll = Poll()
    loading: Loading = Loading()
    dialects: Dialects = Dialects()
    trace: Trace = Trace()
    responses: Responses = Responses()
    neurons: list[NeuronEntry] = []
    drain_s: Grace = 30


class NeuronSettings(Section, frozen=True):
    host: Text = "127.0.0.1"
    port: Port = 13131
    models_dir: Text | None = None
    allowed_roots: list[Text] = []  # further folders that a remote caller's `source` may lie in
    allowed_hosts: list[Text] = []  # public names this node is called by; addresses and local names need none
    isolation: Literal["process", "none"] = "process"
    memory_limit_mb: list[Annotated[int, Meta(ge=1, le=2**31 - 1)]] | None = None  # per device; left out: what it has
    allow_downloads: bool = True
    fetch_images: bool = False  # images that a chat names by an http(s) address; public addresses only
    gguf_owners: list[Text] = msgspec.field(
        default_factory=lambda: ["ggml-org", "unsloth", "bartowski", "lmstudio-community"]
    )
    default_models: list[LoadRequest] = []
    token: Text | None = None
    run_dir: Text | None = None  # sockets; left out: $XDG_RUNTIME_DIR/helexa, else a private folder in /tmp
    spare_host: bool = True  # keep one started host process waiting, so that a swap does not pay for its imports
    kv_store: bool = True  # prompt caches of models that are unloaded stay on disk for their next load
    kv_store_dir: Text | None = None  # left out: $CACHE_DIRECTORY/kv, $XDG_CACHE_HOME/helexa/kv or ~/.cache/helexa/kv
    kv_store_limit_mb: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 8192
    kv_store_max_age_s: Seconds = 86_400
    body_limit_mb: BodyMB = 64
    drain_s: Grace = 30
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()


def log_warning(message: str) -> None:
    logs.get("helexa.settings").warning(message)


def load_cortex(path: Path | None, env: Mapping[str, str], warn: Callable[[str], None] = log_warning) -> CortexSettings:
    """cortex.toml with CORTEX_* on top. Raises ConfigError with everything that is wrong in it."""
    return settings_file.read(
        CortexSettings,
        path,
        env=env,
        prefix="CORTEX_",
        not_settings=CORTEX_VARIABLES,
        legacy=is_legacy,
        idle=IDLE,
        rules=_cortex_rules,
        warn=warn,
    )


def load_neuron(path: Path | None, env: Mapping[str, str], warn: Callable[[str], None] = log_warning) -> NeuronSettings:
    """neuron.toml with NEURON_* on top. Raises ConfigError with everything that is wrong in it."""
    return settings_file.read(
        NeuronSettings,
        path,
        env=env,
        prefix="NEURON_",
        not_settings=NEURON_VARIABLES,
        legacy=is_legacy,
        idle=IDLE,
        rules=_neuron_rules,
        warn=warn,
    )


def find_catalogue(settings: CortexSettings, settings_path: Path | None) -> Path | None:
    """Where models.toml is: the file that was named, else the one beside cortex.toml; None where there is none.

    A relative name counts from the folder of cortex.toml. Raises ConfigError where the named file is absent.
    """
    folder = settings_path.parent if settings_path is not None else Path.cwd()
    if (named := settings.gateway.models_config) is not None:
        path = (folder / Path(named).expanduser()).absolute()
        if not path.is_file():
            raise ConfigError(
                [
                    Problem(
                        str(settings_path or "settings"), "[gateway] models_config", f"names {path}, which is not there"
                    )
                ]
            )
        return path
    beside = folder / "models.toml"
    return beside.absolute() if settings_path is not None and beside.is_file() else None


def split_listen(listen: str) -> tuple[str, int]:
    """ "[::1]:31313" -> ("::1", 31313). Raises ValueError with the reason."""
    host, colon, port = listen.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65_535:
        raise ValueError('must be host:port with a port from 0 to 65,535, like "127.0.0.1:31313"')
    if not host:
        raise ValueError(
            f'has no host; "0.0.0.0:{port}" listens on every address, "127.0.0.1:{port}" on this machine only'
        )
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f'has an IPv6 address without brackets; write "[{host}]:{port}"')
    if not is_host(host):
        raise ValueError(f'has no usable host: "{host}" is neither an address nor a name')
    return host, int(port)


def is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # Only digits and dots is an address that went wrong, not a name (RFC 1123, section 2.1).
        name = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
        return bool(re.fullmatch(rf"{name}(\.{name})*\.?", host)) and not re.fullmatch(r"[0-9.]+", host)
    return True


def is_loopback(host: str) -> bool:
    """Does listening on this host stay on this machine? A name is taken for remote, but for localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_legacy(key: Key) -> bool:
    """Keys that existing files have and nothing here uses (docs/reference/settings.md, "Old keys")."""
    return key in {("entitlements",), ("upstream",)} or key[-1] in ("limit", "models_config")


# --- what types cannot say


def _cortex_rules(settings: CortexSettings) -> Iterator[Fault]:
    gateway = settings.gateway
    for name, listen in (("listen", gateway.listen), ("metrics_listen", gateway.metrics_listen)):
        yield from _fault_of(split_listen, listen, ("gateway", name))
    if gateway.listen == gateway.metrics_listen and not gateway.listen.endswith(":0"):
        yield Fault(("gateway", "metrics_listen"), "is the same as listen; give it a port of its own")
    for index, origin in enumerate(gateway.cors_origins):
        if origin != "*" and not re.fullmatch(r"https?://[^/\s?#@]+", origin):
            yield Fault(("gateway", "cors_origins", index), 'must be "*" or scheme://host[:port] without a path')
    if settings.responses.path is not None and not Path(settings.responses.path).is_absolute():
        yield Fault(("responses", "path"), 'must be a whole path, like "/var/lib/helexa/responses.sqlite"')
    names: dict[str, int] = {}
    endpoints: dict[str, str] = {}
    for index, entry in enumerate(settings.neurons):
        at: Key = ("neurons", index)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", entry.name):
            yield Fault((*at, "name"), "must be at most 63 letters, digits, dots, dashes and underscores")
        if (first := names.setdefault(entry.name, index)) != index:
            yield Fault((*at, "name"), f"is used twice (entries {first + 1} and {index + 1})")
        yield from _fault_of(check_endpoint, entry.endpoint, (*at, "endpoint"))
        if (other := endpoints.setdefault(entry.endpoint.rstrip("/").lower(), entry.name)) != entry.name:
            yield Fault((*at, "endpoint"), f'is the endpoint of "{other}" too; one node has one entry')
        yield from _token_rules(entry.token, (*at, "token"))


def _neuron_rules(settings: NeuronSettings) -> Iterator[Fault]:
    if not is_host(settings.host):
        yield Fault(("host",), f'must be an address or a name, not "{settings.host}"; the port has its own key')
    for index, owner in enumerate(settings.gguf_owners):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", owner):
            yield Fault(("gguf_owners", index), "must be the name of a Hub account, without a slash")
    yield from _token_rules(settings.token, ("token",))
    seen: dict[str, int] = {}
    for index, request in enumerate(settings.default_models):
        at: Key = ("default_models", index)
        if request.model_id and request.model and request.model != request.model_id:
            yield Fault((*at, "model"), "names another model than model_id; one of them is enough")
        yield from profile.id_faults(request.id, (*at, "model_id"))
        if (first := seen.setdefault(request.id, index)) != index:
            yield Fault((*at, "model_id"), f"is loaded twice (entries {first + 1} and {index + 1})")
        yield from profile.faults(request, at)


def check_endpoint(endpoint: str) -> None:
    """A node's address as the gateway can reach it. Raises ValueError with the reason."""
    if endpoint.startswith("unix:"):
        if not endpoint.startswith("unix:/") or endpoint.endswith("/"):
            raise ValueError('must name a socket by its whole path, like "unix:/run/helexa/neuron.sock"')
        return
    example = 'must be like "http://beast.internal:13131"'
    if not endpoint.isascii() or not endpoint.isprintable() or " " in endpoint:
        raise ValueError(f"{example}; it has spaces or characters that no address has")
    try:
        url = urlsplit(endpoint)
        port, host = url.port, url.hostname
    except ValueError as err:
        raise ValueError(f"{example}; {err}") from None
    if url.scheme == "https":
        raise ValueError("must begin with http://; nodes speak plain HTTP, so put TLS between them where you need it")
    if url.scheme != "http" or not host:
        raise ValueError(f"{example}; it needs http:// and a host")
    if url.username is not None or url.query or url.fragment:
        raise ValueError(f"{example}, without user, query or fragment; a key goes into token")
    if not is_host(host):
        raise ValueError(f'{example}; "{host}" is neither an address nor a name')
    if port == 0:
        raise ValueError(f"{example}; port 0 cannot be connected to")


def _fault_of(check: Callable[[str], object], text: str, key: Key) -> Iterable[Fault]:
    try:
        check(text)
    except ValueError as err:
        yield Fault(key, str(err))


def _token_rules(token: str | None, key: Key) -> Iterator[Fault]:
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        yield Fault(key, "must be printable ASCII without spaces; it travels in a header")
