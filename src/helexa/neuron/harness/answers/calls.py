"""A call's text, whole, as name and arguments: JSON objects, and Python calls as some models write them. Pure.

None is no call: no such function, arguments that are no object, or no JSON at all. What a model wrote then is text.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any, Final

from helexa.neuron.harness.answers.pieces import Tools

_ARGUMENTS: Final = ("arguments", "parameters")
_PYTHON: Final = 100_000  # characters of a call written as Python
_CODE_TOOLS: Final = ("python", "ipython", "code_interpreter", "execute_python", "run_python")

NamedCall = tuple[str, str]  # name, arguments as the text of a JSON object


def json_call(text: str, tools: Tools, *, bare: bool = False) -> NamedCall | None:
    """`{"name": ..., "arguments": {...}}`, or with `parameters`, or with all that below `function`. bare: nothing says
    that it is a call but its arguments, which have to be there."""
    value = loads(text)
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return None
    name = value.get("name", value.get("function"))
    if not isinstance(name, str) or name not in tools:
        return None
    if bare and not any(key in value for key in _ARGUMENTS):
        return None
    arguments: Any = next((value[key] for key in _ARGUMENTS if key in value), {})
    if isinstance(arguments, str):
        arguments = loads(arguments) if arguments.strip() else {}
    return (name, dumps(arguments)) if isinstance(arguments, dict) else None


def object_text(text: str) -> str | None:
    """Arguments that stand by themselves, dense; nothing at all is {}."""
    value = loads(text) if text.strip() else {}
    return dumps(value) if isinstance(value, dict) else None


def json_calls(text: str, tools: Tools) -> list[NamedCall] | None:
    """One call, or an array of them."""
    stripped = text.strip()
    if not stripped.startswith("["):
        return [call] if (call := json_call(stripped, tools)) is not None else None
    value = loads(stripped)
    if not isinstance(value, list) or not value:
        return None
    calls = [json_call(dumps(item), tools) for item in value]
    return None if None in calls else [call for call in calls if call is not None]


def python_calls(text: str, tools: Tools) -> list[NamedCall] | None:
    """`f(a=1)`, `f.call(a=1)`, `print(f(a=1))`, several of them in lines or in a list. Arguments are literals."""
    if len(text) > _PYTHON:
        return None
    try:
        body = ast.parse(text.strip()).body
        nodes: list[ast.expr] = []
        for statement in body:
            if isinstance(statement, ast.Assign):
                nodes.append(statement.value)
            elif isinstance(statement, ast.Expr):
                nodes += statement.value.elts if isinstance(statement.value, ast.List) else [statement.value]
            else:
                return None
        calls = [_python_call(node, tools) for node in nodes]
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError):
        return None
    return [call for call in calls if call is not None] if calls and None not in calls else None


def _python_call(node: ast.expr, tools: Tools) -> NamedCall | None:
    if not isinstance(node, ast.Call):
        return None
    function = node.func
    if isinstance(function, ast.Name) and function.id == "print" and len(node.args) == 1 and "print" not in tools:
        return _python_call(node.args[0], tools)
    if isinstance(function, ast.Attribute) and function.attr == "call":
        function = function.value
    name = ast.unparse(function)
    if name not in tools:
        return None
    names = list(_properties(tools[name]))
    if len(node.args) > len(names):
        return None
    arguments = {names[i]: ast.literal_eval(value) for i, value in enumerate(node.args)}
    for keyword in node.keywords:
        if keyword.arg is None:
            return None
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return name, dumps(arguments)


def code_call(code: str, tools: Tools) -> NamedCall | None:
    """Program text for the tool that runs it, where one is offered."""
    for name in _CODE_TOOLS:
        if name in tools:
            return name, dumps({next(iter(_properties(tools[name])), "code"): code})
    return None


def typed(text: str, schema: Any) -> Any:
    """A parameter that was written as bare text, as the schema wants it: text where it may be text, else JSON."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = {kind} if isinstance(kind, str) else set(kind) if isinstance(kind, list) else set()
    if isinstance(schema, Mapping) and not kinds:
        options = schema.get("enum") or [schema["const"]] if "const" in schema or schema.get("enum") else []
        if text in options:
            return text
        for key in ("anyOf", "oneOf"):
            for option in schema.get(key) or ():
                if isinstance(option, Mapping) and isinstance(option.get("type"), str):
                    kinds.add(option["type"])
    if "string" in kinds and not (text == "null" and "null" in kinds):
        return text
    value = loads(text)
    if value is None and text.strip() != "null":
        lower = text.strip().lower()
        return {"true": True, "false": False, "none": None}.get(lower, text)
    return value


def loads(text: str) -> Any:
    """None for what is no JSON. Line breaks within texts are taken, as models write them."""
    try:
        return json.loads(text, strict=False, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def dumps(value: Any) -> str:
    """As OpenAI writes arguments: dense, and characters as they are. Raises TypeError, ValueError for what JSON has
    not."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Half a character, which a text may have as an escape, cannot be sent as it is.
    return text if _is_whole(text) else json.dumps(value, separators=(",", ":"), allow_nan=False)


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are no JSON


def _properties(schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    properties = (schema or {}).get("properties")
    return properties if isinstance(properties, Mapping) else {}
