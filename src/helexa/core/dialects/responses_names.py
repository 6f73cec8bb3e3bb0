"""The chat body's fields as clients of Responses know them, for errors that a node names them in. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_NAMES: Final = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.type": "text.format.type",
    "response_format.json_schema.schema": "text.format.schema",
    "reasoning_effort": "reasoning.effort",
    "tool_choice.function.name": "tool_choice.name",
}
_INDEXED: Final = re.compile(r"(messages|tools)\[(\d+)\](?:\.function)?(.*)")


@dataclass(frozen=True, slots=True)
class Places:
    """messages, tools: of each message and function of the chat body, where in the request it comes from."""

    messages: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()

    def name(self, param: str) -> str:
        if (found := _INDEXED.fullmatch(param)) is not None:
            places = self.messages if found[1] == "messages" else self.tools
            at = int(found[2])
            return f"{places[at]}{found[3]}" if at < len(places) else param
        return _NAMES.get(param, param)
