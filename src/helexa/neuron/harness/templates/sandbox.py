"""The Jinja environment of chat templates: what transformers gives them, sandboxed the same way, and bounded.

Loops, calls, filters, operators and output are charged to the thread's Budget; a compiled template does so by itself,
because the code that Jinja generates for it is ours where it has to be (loops, literals, `~`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from helexa.neuron.harness.templates import sizes
from helexa.neuron.harness.templates.budget import current

SOURCE: Final = 1 << 20  # characters of a template; the longest in use has some 30,000


class Raised(jinja2.exceptions.TemplateError):
    """The template refused the conversation itself, with raise_exception()."""


class _Generator(CodeGenerator):
    """Adds a step to each turn of a loop, and has what a literal makes charged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loop_bodies: dict[int, int] = {}  # id of the body -> characters of text that stand in it

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        self._loop_bodies[id(node.body)] = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        if node.test is not None:  # turns whose test fails never reach the body
            counted = nodes.Call(nodes.EnvironmentAttribute("counted"), [], [], None, None)
            node.test = nodes.And(counted, node.test).set_environment(self.environment)
        super().visit_For(node, frame)

    def blockvisit(self, nodes: Any, frame: Frame) -> None:
        if (chars := self._loop_bodies.pop(id(nodes), None)) is not None:
            self.writeline(f"environment.step({chars})")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._charged(node, frame, super().visit_List)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._charged(node, frame, super().visit_Dict)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._charged(node, frame, super().visit_Tuple)
        else:
            super().visit_Tuple(node, frame)

    def _charged(self, node: Any, frame: Frame, visit: Callable[[Any, Frame], None]) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """{% generation %} marks what the model wrote, for training; here its body stands as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """The template's `dict`: a function, and nothing of the type beside."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """Without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}: it begins with an underscore")


class Environment(ImmutableSandboxedEnvironment):
    """now: what strftime_now tells. Shared by threads: what a rendering costs stands in its own Budget."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_output,
            cache_size=0,
            extensions=[_Generation, loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _charged_filter(name, function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda format: _told(now(), format)
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]  # nonsense text, of any length

    def step(self, chars: int) -> None:
        current().step(chars)

    def counted(self) -> bool:
        return True  # the step is call's

    def made(self, value: Any) -> Any:
        return current().made(value)

    def concatenated(self, parts: Sequence[Any]) -> str:
        budget = current()
        budget.check_room(sum(budget.weight(part) for part in parts))
        joined = "".join(map(str, parts))
        budget.step(len(joined))
        return joined

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current()
        if operator == "*":
            budget.check_room(sizes.multiplied(budget, left, right))
        elif operator == "**":
            sizes.check_power(left, right)
        elif operator == "%" and isinstance(left, (str, bytes)):
            budget.check_room(sizes.percent_formatted(budget, left, right))
        return budget.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            budget = current()
            budget.check_room(sizes.brace_formatted(budget, value.__self__, [args, kwargs]))
            return wrapped(*args, **kwargs)

        return formatted

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            estimate = sizes.METHODS.get(getattr(__obj, "__name__", ""))
            if estimate is not None:
                budget.check_room(estimate(budget, owner, args, kwargs))
        return budget.made(super().call(__context, __obj, *args, **kwargs))


def _charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    estimate = sizes.FILTERS.get(name)
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment goes first

    @functools.wraps(function)  # and with it what Jinja noted about the first argument
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = current()
        if estimate is not None and len(args) > skip:
            budget.check_room(estimate(budget, args[skip], args[skip + 1 :], kwargs))
        elif name == "string" and len(args) > skip:
            budget.check_room(4 * budget.weight(args[skip]))
        return budget.made(function(*args, **kwargs))

    return charged


def _output(value: Any) -> Any:
    """HOT. Each `{{ }}`, before it is made text."""
    budget = current()
    budget.step(budget.weight(value))
    return value


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes HTML, which a model would read."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise Raised(str(message))


def _told(now: datetime, format: str) -> str:
    sizes.check_time_format(format)
    return now.strftime(format)


def variables(environment: Environment, source: str) -> set[str]:
    """What the template reads without setting it, the environment's own names aside."""
    return set(meta.find_undeclared_variables(environment.parse(source)))
