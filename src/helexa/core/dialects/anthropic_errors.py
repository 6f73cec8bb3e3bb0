"""The chat body's fields as Anthropic's clients know them, for errors that a node names them in. Pure."""

from __future__ import annotations

import re
from typing import Final

_NAMES: Final = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
_PARAMETERS: Final = re.compile(r"tools\[(\d+)\]\.function\.(?:parameters|(name|description))")


def naming(param: str) -> str:
    found = _PARAMETERS.match(param)
    if found is not None:
        return f"tools.{found[1]}.{found[2] or 'input_schema'}"
    return _NAMES.get(param, param)
