"""Which endpoint a model answers, by its task. Pure; shared by the harnesses."""

from __future__ import annotations

from typing import Final

from helexa.core.errors import WrongTask
from helexa.neuron.harness.openai_lists import CHAT, COMPLETIONS, EMBEDDINGS, RERANK

# A model without a chat template still completes.
TASKS: Final = {
    CHAT: frozenset({"chat"}),
    COMPLETIONS: frozenset({"chat", "completion"}),
    EMBEDDINGS: frozenset({"embed"}),
    RERANK: frozenset({"rerank"}),
}
_HOME: Final = {"chat": CHAT, "completion": COMPLETIONS, "embed": EMBEDDINGS, "rerank": RERANK}


def check(model: str, task: str, path: str) -> None:
    """HOT. Raises WrongTask."""
    if task in TASKS[path]:
        return
    home = _HOME.get(task)
    hint = f"use {home}" if home else "see /v1/models for what it does"
    if task == "completion" and path == CHAT:
        hint += ", or load it with a `chat_template`: its file has none"
    raise WrongTask(f"{model} is a model for {task} and does not answer {path}; {hint}.", param="model")
