"""What a model can, told from its task and its chat template. Pure; shared by the harnesses."""

from __future__ import annotations

from typing import Final

REASONING_MARKS: Final = ("<think", "enable_thinking", "reasoning_content", "<|channel|>")
TOOL_MARKS: Final = ("tools", "tool_call")


def capabilities(task: str, template: str | None, *, sees: bool = False) -> tuple[str, ...]:
    if task in ("embed", "rerank"):
        return (task,)
    if task != "chat":
        return ()
    text = template or ""
    found = ["chat"]
    if knows_tools(text):
        found.append("tools")
    if any(mark in text for mark in REASONING_MARKS):
        found.append("reasoning")
    if sees:
        found.append("vision")
    return tuple(found)


def knows_tools(template: str) -> bool:
    return any(mark in template for mark in TOOL_MARKS)
