"""The llama harness: GGUF models on llama.cpp, embedded through xllamacpp. Cheap to import: no engine, no numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import FreeDevice, Harness, ModelFacts, ModelFiles, Plan, PromptCache, Session

if TYPE_CHECKING:
    from helexa.neuron.harness.llama.engine import Engine


class LlamaHarness:
    """harness.base.Harness for llama.cpp."""

    name = "llama"
    format = "gguf"
    own_process = False

    def engine_version(self) -> str | None:
        from helexa.neuron.harness.llama.engine import engine_version

        return engine_version()

    def why_not(self) -> str | None:
        from importlib.util import find_spec

        if find_spec("xllamacpp") is None:
            return "llama.cpp is not installed here: pip install 'helexa[llama]'"
        return None

    def can_serve(self, files: ModelFiles) -> bool:
        return bool(files.files) and all(path.suffix == ".gguf" for path in files.files)

    def inspect(self, files: ModelFiles, request: LoadRequest) -> ModelFacts:
        from helexa.neuron.harness.llama.facts import inspect

        return inspect(files, request)

    def plan(self, request: LoadRequest, files: ModelFiles, facts: ModelFacts, devices: Sequence[FreeDevice]) -> Plan:
        from helexa.neuron.harness.llama.planning import plan

        return plan(request, files, facts, devices)

    def host_spec(self, plan: Plan, socket: Path, api_key: str, states: Path | None = None) -> dict[str, Any]:
        files = plan.files
        return {
            "model_id": files.model_id,
            "files": [str(path) for path in files.files],
            "projector": str(files.projector) if files.projector else None,
            "draft": str(files.draft) if files.draft else None,
            "lora": [str(path) for path in files.lora],
            "socket": str(socket),
            "api_key": api_key,
            "states": str(states) if states else None,
            "options": plan.extra,
            "counts": False,
        }

    def counting_spec(self, plan: Plan, socket: Path, api_key: str) -> dict[str, Any]:
        from helexa.neuron.harness.llama.vocabulary import OPTIONS

        spec = self.host_spec(plan, socket, api_key)
        return {**spec, "projector": None, "draft": None, "lora": [], "options": plan.extra | OPTIONS, "counts": True}

    def counter(self) -> Harness:
        return self

    def counting_mb(self, plan: Plan) -> int:
        from helexa.neuron.harness.llama.vocabulary import host_mb

        return host_mb(plan.facts.extra["geometry"])

    def warm(self) -> None:
        from helexa.neuron.harness.llama.engine import warm

        warm()

    def serve(self, spec: dict[str, Any], progress: Callable[[float], None]) -> Engine:
        from helexa.neuron.harness.llama.engine import serve

        return serve(spec, progress)

    def session(self, plan: Plan) -> Session:
        from helexa.neuron.harness.llama.session import LlamaSession

        return LlamaSession(plan)

    def prompt_cache(self, plan: Plan) -> PromptCache | None:
        from helexa.neuron.harness.llama.prompt_cache import LlamaPromptCache, can_save

        return LlamaPromptCache(plan, self.engine_version()) if can_save(plan) else None
