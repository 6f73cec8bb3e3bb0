"""The protocol between the daemon and its engines. What an engine is, the daemon never asks.

A Harness looks at a model on disk and says what it would take; in the host process its `serve` runs the engine; in
the daemon a Session mends, per request, what that engine does not answer rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from helexa.core.errors import HelexaError
from helexa.core.lifecycle import Estimate, LoadRequest
from helexa.core.relay.contract import Exchange, Mend
from helexa.core.relay.upstream import Upstream

CACHE_BLOCK: Final = 256  # tokens; prompt caches are compared by these


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model resolved to what is on disk. `files` are all parts, the first one first."""

    model_id: str
    files: tuple[Path, ...]
    projector: Path | None = None
    draft: Path | None = None
    lora: tuple[Path, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(f.stat().st_size for f in self.files)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the file's header says."""

    architecture: str
    task: str  # chat | completion | embed | rerank
    n_ctx_train: int
    n_params: int
    size_bytes: int
    quant: str | None
    capabilities: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)  # the harness's own (layers, heads, template)


@dataclass(frozen=True, slots=True)
class FreeDevice:
    """A device as a load may use it now. free_mb is what may still be taken, limits and reservations counted."""

    index: int
    kind: str
    name: str
    free_mb: int
    total_mb: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A profile made concrete: nothing is left to the engine's own defaults that we promise."""

    request: LoadRequest
    files: ModelFiles
    facts: ModelFacts
    estimate: Estimate
    context: int
    slots: int
    device_indices: tuple[int, ...]
    extra: dict[str, Any] = field(default_factory=dict)  # the harness's own choices, for host_spec


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as the engine gets it. body None: as it came."""

    body: bytes | None = None
    mend: Mend | None = None
    first_event: bool = False
    content_type: bytes | None = None  # told to the client in place of the engine's: the mend collects a stream
    dropped: tuple[str, ...] = ()  # what the answer is made without, by name, for `x-helexa-dropped`
    cut_progress: bool = False  # the engine tells of its prefill so that it notices a client that left; not to be shown


class Session(Protocol):
    """One loaded model, seen from the daemon. Pure but for `learn` and `count_tokens`."""

    async def learn(self, engine: Upstream) -> None:
        """Once, before the first request: ask the engine what the file alone does not tell. Never raises."""

    def prepare(self, exchange: Exchange) -> Prepared:
        """HOT. Raises HelexaError for what this model cannot do (wrong task, modality, a field's bad value)."""

    def refusal(self, exchange: Exchange, status: int, body: bytes) -> HelexaError | None:
        """The engine's own error in our taxonomy; None forwards it."""

    def check_chats(self) -> None:
        """Raises WrongTask where this model answers no chat, so that there is no prompt to count."""

    async def count_tokens(self, body: bytes, engine: Upstream) -> int:
        """Prompt tokens of a chat body, rendered as the request itself would be. engine: a host of either spec."""


@dataclass(frozen=True, slots=True)
class SlotUse:
    """What one slot of an engine holds. stamp grows with each request, over all slots; None: none has used this one
    since the load."""

    index: int
    tokens: int
    stamp: int | None


@dataclass(frozen=True, slots=True)
class Saved:
    """What was written of a slot. blocks: a hash for each whole CACHE_BLOCK of tokens and all before them; empty where
    the engine does not tell its tokens."""

    tokens: int
    blocks: tuple[str, ...]


class CacheFailed(Exception):
    """The engine did not write, or did not take, a prompt cache. str() is its reason."""


class PromptCache(Protocol):
    """The prompt cache of one loaded model, by slot, seen from the daemon. `engine` is where the model answers.

    fingerprint: of all that a saved state depends on beside the model's files: the engine, its version and settings.
    Raises CacheFailed, ConnectionError, TimeoutError.
    """

    fingerprint: str

    async def slots(self, engine: Upstream) -> list[SlotUse]: ...

    async def save(self, engine: Upstream, slot: int, file: Path) -> Saved:
        """Into this file, which is there and empty, in the folder that host_spec was given."""

    async def restore(self, engine: Upstream, slot: int, file: Path) -> None:
        """Of an engine that runs no request."""


class Harness(Protocol):
    """Made without arguments, in the daemon and again in each host process, which is told its class by name.

    format:      of the files that it serves, as the store calls it: gguf | safetensors
    own_process: whether its host must be a process, whatever the daemon's `isolation` says
    """

    name: str
    format: str
    own_process: bool

    def engine_version(self) -> str | None:
        """Version of the engine, None where it is not installed."""

    def why_not(self) -> str | None:
        """Why this harness cannot run here, with the way out (pip install ...); None if it can."""

    def warm(self) -> None:
        """In the host process, before it has orders: import what `serve` needs, so that a load does not pay for it."""

    def can_serve(self, files: ModelFiles) -> bool: ...

    def inspect(self, files: ModelFiles, request: LoadRequest) -> ModelFacts:
        """Read headers only. Raises NeverLoads where a file is absent, truncated, or lies."""

    def plan(self, request: LoadRequest, files: ModelFiles, facts: ModelFacts, devices: Sequence[FreeDevice]) -> Plan:
        """Context, slots, devices and estimate. Does not raise for what does not fit: estimate.why says so.
        Raises BadRequest for an impossible option, naming it."""

    def host_spec(self, plan: Plan, socket: Path, api_key: str, states: Path | None = None) -> dict[str, Any]:
        """JSON-able orders for `serve`, which runs in another process. states: the folder for saved prompt caches."""

    def counting_spec(self, plan: Plan, socket: Path, api_key: str) -> dict[str, Any]:
        """The same for a host that only counts tokens: tokenizer and template of the plan's model, no weights."""

    def counter(self) -> Harness:
        """Whose host serves a counting_spec: itself, or one that imports less."""

    def counting_mb(self, plan: Plan) -> int:
        """The host's memory that such a host takes."""

    def serve(self, spec: dict[str, Any], progress: Callable[[float], None]) -> Any:
        """In the host process: load the model and answer HTTP on the socket. Blocks while loading; the returned
        object keeps the engine alive, and its `close()` ends it. Raises RuntimeError with a reason."""

    def session(self, plan: Plan) -> Session: ...

    def prompt_cache(self, plan: Plan) -> PromptCache | None:
        """None where this engine cannot save that of such a model."""
