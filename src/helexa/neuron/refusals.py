"""What a node answers about a model that it does not serve as asked: the words, and what is true of its state."""

from __future__ import annotations

from typing import Any

from helexa.core.errors import Conflict, HelexaError, LoadFailed, ModelLoading, ModelUnloading, ShuttingDown
from helexa.core.lifecycle import ModelStatus, Progress


def still_loading(model_id: str, node: str, status: ModelStatus, progress: Progress | None) -> HelexaError:
    loading: dict[str, Any] = {"state": str(status), "node": node}
    if progress is not None and progress.fraction is not None:
        loading["progress"] = progress.fraction
    if progress is not None and progress.eta_seconds is not None:
        loading["eta_seconds"] = progress.eta_seconds
    return ModelLoading(f"{model_id} is {status} on {node}; try again in a moment.", details={"loading": loading})


def not_loaded(model_id: str, node: str) -> HelexaError:
    """Not a 404: a gateway that comes too late tries elsewhere, and a person is told what to do."""
    return ModelLoading(
        f"{model_id} is on the disk of {node} but not loaded. Load it with POST /models/load, or ask the gateway, "
        "which loads by itself.",
        details={"loading": {"state": str(ModelStatus.UNLOADED), "node": node}},
    )


def unloading(model_id: str, node: str) -> HelexaError:
    return ModelUnloading(f"{model_id} is being unloaded on {node}; ask another node, or again later.")


def was_unloaded(model_id: str, node: str) -> HelexaError:
    return ModelUnloading(f"{model_id} was unloaded on {node} while it was loading.")


def failed(model_id: str, reason: str | None) -> HelexaError:
    return LoadFailed(f"{model_id} is not served: {reason}. Load it again when the cause is mended.")


def loaded_differently(model_id: str, status: ModelStatus, asked: str, has: str | None) -> HelexaError:
    return Conflict(
        f"{model_id} is {status} with another profile than this request asks for. Unload it first, or ask for the "
        "profile it has.",
        code="loaded_differently",
        details={"spec_hash": has, "asked": asked},
    )


def in_use(model_id: str, active: int) -> HelexaError:
    return Conflict(
        f"{model_id} is in use ({active} running). Give it time with drain_s, or cut what runs with force.",
        code="model_in_use",
        details={"active_requests": active},
    )


def not_ended(model_id: str) -> HelexaError:
    return Conflict(
        f"{model_id} could not be ended: its engine does not let go. What it holds stays taken until it does, or until "
        "the daemon is started again.",
        code="not_ended",
    )


def shutting_down() -> HelexaError:
    return ShuttingDown("This node is shutting down; ask again in a moment, or another node.")
