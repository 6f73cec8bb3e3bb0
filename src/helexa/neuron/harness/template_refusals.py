"""What a chat template says against a conversation, told to whoever sent it. Pure; shared by the harnesses."""

from __future__ import annotations

import re
from typing import Final

from helexa.core.errors import BadRequest, HelexaError, TemplateFailed

# How templates say that user and assistant have to take turns (Gemma, Mistral and Llama 2 each in their words).
_ALTERNATES: Final = re.compile(r"\balternat|\btake turns\b", re.IGNORECASE)
_TURNS: Final = (
    "it takes messages of the user and of the assistant by turns alone, the user's first; what stands together has to "
    "be one message"
)


def refusal(model: str, said: str, *, with_tools: bool) -> HelexaError:
    """said: the template's own words. With tools it is TemplateFailed, since an answer without them would be another
    question's."""
    rule = f" ({_TURNS})" if _ALTERNATES.search(said) else ""
    if with_tools:
        what = f"{model}: its chat template refuses these messages with tools: {said}{rule}"
        return TemplateFailed(what, param="messages")
    return BadRequest(f"{model}: its chat template refuses these messages: {said}{rule}", param="messages")
