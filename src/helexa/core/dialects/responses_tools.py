"""OpenAI's tools as the neuron's functions, and which of the client's tools a call of a function means. Pure.

A function stays one. A custom tool, whose input is a text, becomes a function with one string. The tools of a namespace
become functions of their own, named after both. What only OpenAI's servers or its own models can run is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from helexa.core.dialects import responses_wire as wire
from helexa.core.errors import BadRequest

# The one argument of a function that stands for a custom tool.
INPUT: Final = "input"


def bad(where: str, what: str) -> BadRequest:
    """As nodes say it: "`tools[0].name` is required."."""
    return BadRequest(f"`{where}` {what}.", param=where)


@dataclass(frozen=True, slots=True)
class Called:
    """What a function of the chat body is to the client."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


def function_name(name: str, namespace: str | None) -> str:
    """One name for a tool in a namespace; where none is given, the tool's own."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


class Tools:
    """functions:  for the chat body
    places:     of each of them in the request
    called:     what each of their names means
    """

    def __init__(self, drop: Callable[[str], None], *, refuse_hosted: bool) -> None:
        self._drop = drop
        self._refuse_hosted = refuse_hosted
        self.functions: list[dict[str, Any]] = []
        self.places: list[str] = []
        self.called: dict[str, Called] = {}
        self._flat: dict[str, list[str]] = {}  # of each tool's own name, those of its functions

    def read(self, tools: Sequence[wire.Tool], where: str = "tools") -> list[int]:
        """The indices of those that the model is given. Raises BadRequest."""
        given = []
        for i, tool in enumerate(tools):
            place = f"{where}[{i}]"
            if tool.type in ("function", "custom"):
                self._add(tool, place, None)
            elif tool.type == "namespace":
                self._namespace(tool, place)
            elif not tool.type:
                raise bad(f"{place}.type", "is required")
            elif self._refuse_hosted:
                raise bad(place, f"of type {tool.type} runs on OpenAI's servers only; leave it out")
            else:
                self._drop(tool.server_label or tool.name or tool.type)
                continue
            given.append(i)
        return given

    def _namespace(self, tool: wire.Tool, place: str) -> None:
        if not tool.name:
            raise bad(f"{place}.name", "is required")
        about = tool.description
        for j, inner in enumerate(tool.tools or ()):
            where = f"{place}.tools[{j}]"
            if inner.type not in ("function", "custom"):
                raise bad(f"{where}.type", "must be function or custom in a namespace")
            # the chat body has no other place for what is said of them all
            self._add(inner, where, tool.name, about=about if j == 0 else None)

    def _add(self, tool: wire.Tool, place: str, namespace: str | None, *, about: str | None = None) -> None:
        if not tool.name:
            raise bad(f"{place}.name", "is required")
        name = function_name(tool.name, namespace)
        if name in self.called:
            raise bad(f"{place}.name", f"{name!r} is the name of another tool too")
        function: dict[str, Any] = {"name": name}
        description = "\n\n".join(text for text in (about, tool.description) if text)
        if description:
            function["description"] = description
        if tool.type == "custom":
            function["parameters"] = self._of_custom(tool)
        else:
            parameters = bytes(tool.parameters)
            if parameters and parameters != b"null":
                if not parameters.startswith(b"{"):
                    raise bad(f"{place}.parameters", "must be an object")
                function["parameters"] = tool.parameters
            if tool.strict is not None:
                function["strict"] = tool.strict
        for known in ("defer_loading", "output_schema"):
            if getattr(tool, known):
                self._drop(f"tools.{known}")
        if tool.allowed_callers not in (None, [], ["direct"]):
            self._drop("tools.allowed_callers")
        self.called[name] = Called(tool.name, namespace, is_custom=tool.type == "custom")
        self._flat.setdefault(tool.name, []).append(name)
        self.places.append(place)
        self.functions.append({"type": "function", "function": function})

    def _of_custom(self, tool: wire.Tool) -> dict[str, Any]:
        text: dict[str, Any] = {"type": "string"}
        if tool.format is not None and tool.format.type == "grammar":
            self._drop("tools.format")  # told, but not enforced
            if tool.format.definition:
                text["description"] = f"In this {tool.format.syntax or 'lark'} grammar:\n{tool.format.definition}"
        return {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}

    # tool_choice

    def choose(self, choice: str | wire.ToolChoice | None) -> tuple[str | dict[str, Any] | None, bool]:
        """The chat body's tool_choice, None where there is nothing to say; and whether a call is forced. Narrows
        `functions` where only some are allowed."""
        if choice is None:
            return None, False
        if isinstance(choice, str):
            return self._mode(choice, "tool_choice")
        if choice.type in ("function", "custom"):
            name = self._named(choice, "tool_choice")
            return {"type": "function", "function": {"name": name}}, True
        if choice.type == "allowed_tools":
            if choice.mode not in ("auto", "required"):
                raise bad("tool_choice.mode", "must be auto or required")
            allowed = {
                self._named(tool, f"tool_choice.tools[{i}]")
                for i, tool in enumerate(choice.tools or ())
                if tool.type in ("function", "custom")
            }
            kept = [i for i, made in enumerate(self.functions) if made["function"]["name"] in allowed]
            self.functions = [self.functions[i] for i in kept]
            self.places = [self.places[i] for i in kept]
            return self._mode(choice.mode, "tool_choice.mode")
        if not choice.type:
            raise bad("tool_choice.type", "is required")
        raise bad("tool_choice.type", f"{choice.type!r} cannot be called here; use function, custom or allowed_tools")

    def _mode(self, mode: str, where: str) -> tuple[str | None, bool]:
        if mode not in ("auto", "required", "none"):
            raise bad(where, f"{mode!r} is not known; use auto, required, none, or name a tool")
        if mode == "required" and not self.functions:
            raise bad(where, "required needs at least one tool that can be called here")
        return (mode if self.functions else None), mode == "required"

    def _named(self, choice: wire.ToolChoice, where: str) -> str:
        if not choice.name:
            raise bad(f"{where}.name", "is required")
        name = function_name(choice.name, choice.namespace)
        if name in self.called:
            return name
        inside = self._flat.get(choice.name, ())
        if not choice.namespace and len(inside) == 1:
            return inside[0]
        raise bad(f"{where}.name", f"{choice.name!r} is not among the tools that can be called here")
