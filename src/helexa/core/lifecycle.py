"""A model's life on a node: its states, what may follow which, and the envelopes of load, unload and listing."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec
import xxhash


class ModelStatus(StrEnum):
    UNLOADED = "unloaded"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    RECOVERING = "recovering"  # it died and comes back by itself; the route is held
    FAILED = "failed"

    @classmethod
    def parse(cls, value: str) -> ModelStatus | None:
        """None for a word we do not know, which the caller reads as "not routable"."""
        try:
            return cls(value)
        except ValueError:
            return None


NEXT: Final[dict[ModelStatus, frozenset[ModelStatus]]] = {
    ModelStatus.UNLOADED: frozenset({ModelStatus.DOWNLOADING, ModelStatus.LOADING}),
    ModelStatus.DOWNLOADING: frozenset({ModelStatus.LOADING, ModelStatus.UNLOADED, ModelStatus.FAILED}),
    ModelStatus.LOADING: frozenset({ModelStatus.LOADED, ModelStatus.UNLOADING, ModelStatus.FAILED}),
    ModelStatus.LOADED: frozenset({ModelStatus.UNLOADING, ModelStatus.RECOVERING, ModelStatus.FAILED}),
    ModelStatus.RECOVERING: frozenset({ModelStatus.LOADED, ModelStatus.UNLOADING, ModelStatus.FAILED}),
    # back to LOADED: a drain that ran out
    ModelStatus.UNLOADING: frozenset({ModelStatus.UNLOADED, ModelStatus.LOADED, ModelStatus.FAILED}),
    ModelStatus.FAILED: frozenset({ModelStatus.LOADING, ModelStatus.DOWNLOADING, ModelStatus.UNLOADED}),
}


# Bounds are checked wherever a profile is decoded: in models.toml, in `default_models`, and in a request's body.
AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class ServingProfile(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is served. The same words in models.toml, in a load request and in `default_models`.

    context is tokens one request may have; the engine's own context is slots x context unless kv_unified.
    """

    source: str | None = None  # a file, a folder, "owner/repo" or "owner/repo:QUANT"
    harness: str | None = None
    quant: str | None = None
    task: str | None = None  # chat | embed | rerank
    context: AtLeastOne | None = None
    slots: AtLeastOne | None = None
    tensor_parallel: AtLeastOne | None = None
    shares: list[Share] | None = None
    devices: list[NotNegative] | None = None
    kv_cache: str | None = None  # f16 | q8_0 | q4_0 ...
    kv_unified: bool | None = None
    gpu_layers: NotNegative | None = None
    threads: AtLeastOne | None = None
    batch: AtLeastOne | None = None
    flash_attention: bool | None = None
    prompt_cache_mb: NotNegative | None = None  # host memory for prompts that left their slot
    chat_template: str | None = None  # Jinja text, in place of the model's own
    merge_system: bool | None = None  # system messages as one; None: where the template takes only one
    draft: str | None = None  # a smaller model for speculative decoding: file or reference
    projector: str | None = None  # mmproj file, for images
    lora: list[str] | None = None
    vram_mb: AtLeastOne | None = None
    min_devices: AtLeastOne | None = None
    min_device_vram_mb: AtLeastOne | None = None
    capabilities: list[str] | None = None


class LoadRequest(ServingProfile, frozen=True):
    """A whole serving profile, as a node is asked for it: the neuron adds nothing to it but its own limits."""

    model_id: str = ""
    model: str | None = None  # taken for model_id

    @property
    def id(self) -> str:
        return self.model_id or self.model or ""

    def spec_hash(self) -> str:
        """Hash of the profile as asked for: two requests with the same hash want the same thing."""
        wire = msgspec.to_builtins(self)
        wire["model_id"] = self.id
        wire.pop("model", None)
        return xxhash.xxh3_64_hexdigest(msgspec.json.encode(wire, order="deterministic"))


class UnloadRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model_id: str = ""
    model: str | None = None
    drain_s: float = 0
    force: bool = False

    @property
    def id(self) -> str:
        return self.model_id or self.model or ""


class DeviceMemory(msgspec.Struct, kw_only=True):
    device: int
    used_mb: int


class ModelLimits(msgspec.Struct, omit_defaults=True, kw_only=True):
    context: int | None = None  # tokens one request may have, prompt and answer
    slots: int | None = None


class Progress(msgspec.Struct, omit_defaults=True, kw_only=True):
    """How far a download or a load is. fraction is 0 to 1; absent rather than guessed."""

    phase: str = "loading"  # downloading | loading
    fraction: float | None = None
    bytes_done: int | None = None
    bytes_total: int | None = None
    eta_seconds: float | None = None


class ModelInfo(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One entry of GET /models, and of "model" events."""

    id: str
    status: str
    harness: str | None = None
    devices: list[int] | None = None
    vram_used_mb: int | None = None
    memory: list[DeviceMemory] | None = None
    active_requests: int | None = None
    queued_requests: int | None = None
    last_used: str | None = None  # RFC 3339, UTC
    limits: ModelLimits | None = None
    capabilities: list[str] | None = None  # chat, tools, reasoning, vision, embed, rerank
    task: str | None = None
    architecture: str | None = None  # llama, qwen3 ...
    spec_hash: str | None = None
    source: str | None = None
    size_bytes: int | None = None
    n_ctx_train: int | None = None
    n_params: int | None = None
    quant: str | None = None
    progress: Progress | None = None
    load_seconds: float | None = None
    error: str | None = None
    error_code: str | None = None  # "out_of_memory": more memory may mend it

    @property
    def parsed_status(self) -> ModelStatus | None:
        return ModelStatus.parse(self.status)


class DeviceEstimate(msgspec.Struct, omit_defaults=True, kw_only=True):
    index: int
    weights_mb: int
    kv_mb: int
    overhead_mb: int
    free_mb: int | None = None

    @property
    def need_mb(self) -> int:
        return self.weights_mb + self.kv_mb + self.overhead_mb


class RankEstimate(msgspec.Struct, kw_only=True):
    """One of the processes that hold a model together."""

    rank: int
    device: int
    weights_mb: int
    kv_mb: int
    overhead_mb: int


class Estimate(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Answer of POST /models/estimate. fits is always written.

    ranks: the same by rank, where there is more than one
    why:   why it does not fit; ways: what of the profile would make it fit, as `key = value`, any one of them
    never: not with nothing else loaded either; why, ways and what is free are then about the empty node
    """

    devices: list[DeviceEstimate]
    ranks: list[RankEstimate] = []
    why: str | None = None
    ways: list[str] = []
    never: bool = False
    context: int | None = None
    slots: int | None = None

    @property
    def fits(self) -> bool:
        return self.why is None

    @property
    def need_mb(self) -> int:
        return sum(d.need_mb for d in self.devices)

    def to_wire(self) -> dict[str, Any]:
        wire: dict[str, Any] = msgspec.to_builtins(self)
        return {"fits": self.fits, "devices": wire.get("devices", []), **wire}
