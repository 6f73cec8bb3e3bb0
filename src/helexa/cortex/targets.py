"""Models as requests need them: where one is loaded, what it may be asked for. Made once for a name, and kept until the
fleet's view changes.
"""

from __future__ import annotations

from typing import Final

from helexa.core.errors import BadRequest, WrongTask
from helexa.core.lifecycle import ModelInfo
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import Replica

_GENERATION: Final = frozenset({"chat", "completion"})
# What a model must be for to serve a path. A chat asked of a model without a chat template is the node's to judge.
_TASKS: Final[dict[str, frozenset[str]]] = {
    "/v1/chat/completions": _GENERATION,
    "/v1/messages": _GENERATION,
    "/v1/messages/count_tokens": _GENERATION,
    "/v1/responses/input_tokens": _GENERATION,
    "/v1/responses": _GENERATION,
    "/api/chat": _GENERATION,
    "/api/generate": _GENERATION,
    "/api/embed": frozenset({"embed"}),
    "/api/embeddings": frozenset({"embed"}),
    "/v1/completions": _GENERATION,
    "/v1/embeddings": frozenset({"embed"}),
    "/v1/rerank": frozenset({"rerank"}),
}
_ALL_TASKS: Final = frozenset[str]().union(*_TASKS.values())
_DOES: Final = {"chat": "chats", "completion": "completes text", "embed": "makes embeddings", "rerank": "reranks"}
_TARGETS_KEPT: Final = 10_000


class Target:
    """One model.

    context:     tokens that a request may have, where known
    replicas:    the fleet's live list
    wrong_paths: what it cannot be asked for, with what it is for
    named:       the header line that tells the client who answered
    is_bounded:  how many requests it may have at once is bounded, or how many a node may
    fallbacks:   what the alias lists beside it, whose preferred model it is
    """

    __slots__ = ("context", "fallbacks", "id", "is_bounded", "named", "replicas", "wrong_paths")

    def __init__(
        self,
        model_id: str,
        replicas: list[Replica],
        tasks: frozenset[str],
        context: int | None = None,
        *,
        is_bounded: bool = False,
    ) -> None:
        self.id = model_id
        self.context = context
        self.replicas = replicas
        self.wrong_paths = {path: tasks for path, need in _TASKS.items() if tasks and not tasks & need}
        self.named = b"x-helexa-model: %b\r\n" % model_id.encode() if model_id.isprintable() else b""
        self.is_bounded = is_bounded
        self.fallbacks: tuple[Target, ...] = ()


class Targets:
    """by_name: by the name that clients use. HOT, once per request; what is not there is to be made."""

    def __init__(self, fleet: Fleet) -> None:
        self.by_name: dict[str, Target] = {}
        self._fleet = fleet
        fleet.on_change.append(self._view_changed)

    def make(self, name: str) -> Target:
        """Raises what `Fleet.candidates` raises, and BadRequest for no name."""
        if not name:
            raise BadRequest('"model" is missing; GET /v1/models lists what is served', param="model")
        target, *others = map(self._target, self._fleet.candidates(name))
        target.fallbacks = tuple(others)
        if len(self.by_name) >= _TARGETS_KEPT:  # one model has many spellings, and a client may try them all
            self.by_name.clear()
        self.by_name[name] = target
        return target

    def _target(self, model_id: str) -> Target:
        context = self._fleet.entry(model_id).get("max_model_len")
        return Target(
            model_id,
            self._fleet.replicas(model_id),
            self._tasks(model_id),
            context,
            is_bounded=self._fleet.is_bounded(model_id),
        )

    def _tasks(self, model_id: str) -> frozenset[str]:
        """What the model is known to be for; empty while nobody knows."""
        known: set[str] = set()
        for _, info in self._fleet.holders(model_id):
            if info is not None:
                known |= _tasks_of(info)
        return frozenset(known & _ALL_TASKS)

    def _view_changed(self, _model_id: str | None) -> None:
        # Names are few and a Target costs microseconds: forgetting all is simpler than knowing which names lead here.
        self.by_name.clear()


def wrong_task(target: Target, path: str) -> WrongTask:
    does = " and ".join(sorted(_DOES[t] for t in target.wrong_paths[path]))
    return WrongTask(
        f"{target.id} {does} and cannot serve {path}; GET /v1/models lists each model's capabilities", param="model"
    )


def _tasks_of(info: ModelInfo) -> set[str]:
    return {*(info.capabilities or ()), *([info.task] if info.task else ())}
