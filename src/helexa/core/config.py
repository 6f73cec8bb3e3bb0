"""Settings of both programs: TOML plus environment overrides in, typed and checked values out.

The structs are the reference: a key that is not here is refused, with the file, the key and the nearest right one.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from helexa.core.lifecycle import LoadRequest


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of a settings file."""


class Gateway(Section, frozen=True):
    listen: str = "127.0.0.1:31313"
    metrics_listen: str = "127.0.0.1:31314"
    metrics_on_api: bool = False  # /metrics on the API port as well
    models_config: str | None = None  # left out: models.toml beside this file, if there is one
    body_limit_mb: int = 64
    cors_origins: list[str] = []


class Timeouts(Section, frozen=True):
    """Seconds. Of a client: head_s, body_min_rate (bytes/s, after 10 s), idle_s. Of a node: the rest."""

    head_s: float = 10
    body_min_rate: int = 1000
    idle_s: float = 75
    connect_s: float = 3
    first_byte_s: float | None = None  # none: prefill and load take what they take
    stall_s: float = 120


class Limits(Section, frozen=True):
    connections: int = 20_000
    connections_per_address: int = 4_096


class Poll(Section, frozen=True):
    interval_s: float = 2


class Loading(Section, frozen=True):
    wait_s: float = 600
    queue: int = 256  # waiting requests per model


class Eviction(Section, frozen=True):
    strategy: Literal["lru", "priority", "adaptive"] = "adaptive"
    defrag_after_cycles: int = 50


class NeuronEntry(Section, frozen=True):
    name: str
    endpoint: str
    token: str | None = None


class CortexSettings(Section, frozen=True):
    gateway: Gateway = Gateway()
    eviction: Eviction = Eviction()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    poll: Poll = Poll()
    loading: Loading = Loading()
    neurons: list[NeuronEntry] = []
    drain_s: float = 30


class NeuronSettings(Section, frozen=True):
    host: str = "127.0.0.1"
    port: int = 13131
    models_dir: str | None = None
    allowed_roots: list[str] = []  # further folders that a remote caller's `source` may lie in
    isolation: Literal["process", "none"] = "process"
    memory_limit_mb: list[int] | None = None  # per device; left out: what the device has
    allow_downloads: bool = True
    gguf_owners: list[str] = msgspec.field(
        default_factory=lambda: ["ggml-org", "unsloth", "bartowski", "lmstudio-community"]
    )
    default_models: list[LoadRequest] = []
    token: str | None = None
    run_dir: str | None = None  # sockets; left out: $XDG_RUNTIME_DIR/helexa, else a private folder in /tmp
    spare_host: bool = True  # keep one started host process waiting, so that a swap does not pay for its imports
    body_limit_mb: int = 64
    drain_s: float = 30
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
