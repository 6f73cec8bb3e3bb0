"""The torch harness: safetensors models on our own engine, on one device or split over several. Cheap to import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import FreeDevice, Harness, ModelFacts, ModelFiles, Plan, PromptCache, Session

if TYPE_CHECKING:
    from helexa.neuron.harness.torch.host import TorchHost

NEEDS: Final = ("torch", "tokenizers", "jinja2", "safetensors", "llguidance")
COUNTING_MB: Final = 50  # interpreter, templates and tokenizer; and five times the tokenizer's file


class TorchHarness:
    """harness.base.Harness for our own engine."""

    name = "torch"
    format = "safetensors"
    own_process = True  # a thread that is stuck in a collective cannot be ended

    def engine_version(self) -> str | None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("torch")
        except PackageNotFoundError:
            return None

    def why_not(self) -> str | None:
        from importlib.util import find_spec

        missing = [name for name in NEEDS if find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} not installed here: pip install 'helexa[torch]'"
        return None

    def can_serve(self, files: ModelFiles) -> bool:
        return bool(files.files) and all(path.suffix == ".safetensors" for path in files.files)

    def inspect(self, files: ModelFiles, request: LoadRequest) -> ModelFacts:
        from helexa.neuron.harness.torch.facts import inspect

        return inspect(files, request)

    def plan(self, request: LoadRequest, files: ModelFiles, facts: ModelFacts, devices: Sequence[FreeDevice]) -> Plan:
        from helexa.neuron.harness.torch.planning import plan

        return plan(request, files, facts, devices)

    def host_spec(self, plan: Plan, socket: Path, api_key: str, states: Path | None = None) -> dict[str, Any]:
        model_id = plan.request.id
        return {"model_id": model_id, "socket": str(socket), "api_key": api_key, "counts": False, **plan.extra}

    def counting_spec(self, plan: Plan, socket: Path, api_key: str) -> dict[str, Any]:
        return self.host_spec(plan, socket, api_key) | {"counts": True}

    def counter(self) -> Harness:
        return TorchCounter()

    def counting_mb(self, plan: Plan) -> int:
        from helexa.neuron.harness.torch.facts import TOKENIZER, folder_of

        return COUNTING_MB + 5 * ((folder_of(plan.files) / TOKENIZER).stat().st_size >> 20)

    def warm(self) -> None:
        from helexa.neuron.harness.torch.host import warm

        warm()

    def serve(self, spec: dict[str, Any], progress: Callable[[float], None]) -> TorchHost:
        from helexa.neuron.harness.torch.host import serve

        return serve(spec, progress)

    def session(self, plan: Plan) -> Session:
        from helexa.neuron.harness.torch.session import TorchSession

        return TorchSession(plan)

    def prompt_cache(self, plan: Plan) -> PromptCache | None:
        return None


class TorchCounter(TorchHarness):
    """For hosts that only count: torch is never imported there."""

    def warm(self) -> None:
        from helexa.neuron.harness.torch.host import warm_prompts

        warm_prompts()
