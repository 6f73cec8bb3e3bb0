"""Does the documentation say what the code does? Links lead somewhere, and the reference names every setting, endpoint,
error code, metric and command that there is, and none that is not. `--write` brings the generated parts up to date.

What is checked comes from the code itself (structs, routes, classes, collectors, command lines), not from a list here.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

Row = tuple[str, list[str], int]  # heading above it, cells, line number
Complaint = str


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that the documentation says what the code does.")
    parser.add_argument("--write", action="store_true", help="bring the generated parts up to date")
    if parser.parse_args().write:
        write_commands()
    complaints = [c for check in CHECKS for c in check()]
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


# --- pages


def text_lines(page: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines outside code fences."""
    fenced = False
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def where(page: Path, line: int | None = None) -> str:
    name = str(page.relative_to(ROOT))
    return name if line is None else f"{name}:{line}"


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, as the usual renderers make them."""
    found: dict[str, int] = {}
    result = set()
    for _, line in text_lines(page):
        if match := re.match(r"#{1,6}\s+(.*?)\s*#*$", line):
            plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", match[1])
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            count = found.get(slug, 0)
            found[slug] = count + 1
            result.add(slug if count == 0 else f"{slug}-{count}")
    return result


def check_links() -> Iterator[Complaint]:
    link = re.compile(r"(?<!!)\[[^]]*\]\(([^)\s]+)\)|!\[[^]]*\]\(([^)\s]+)\)")
    for page in PAGES:
        for number, line in text_lines(page):
            for match in link.finditer(re.sub(r"`[^`]*`", "", line)):
                target = match[1] or match[2]
                if re.match(r"[a-z]+:", target):
                    continue
                path, _, anchor = target.partition("#")
                goal = (page.parent / path).resolve() if path else page
                if not goal.exists():
                    yield f"{where(page, number)}: the link to {path} leads nowhere"
                elif anchor and (goal.suffix != ".md" or anchor not in anchors(goal)):
                    yield f"{where(page, number)}: {path or 'this page'} has no heading #{anchor}"


def check_that_pages_are_reached() -> Iterator[Complaint]:
    """Every page under docs/ is linked from another one: what nobody finds is not documented."""
    linked = set()
    for page in PAGES:
        for _, line in text_lines(page):
            linked |= {(page.parent / t).resolve() for t in re.findall(r"\]\(([^)#\s]+)", line) if ":" not in t}
    for page in sorted(DOCS.rglob("*.md")):
        if page.resolve() not in linked:
            yield f"{where(page)}: no other page links to it"


def rows(page: Path, depth: int = 2) -> list[Row]:
    """Rows of all tables whose first cell is code, with the headings above them as "cortex.toml > [gateway]"."""
    found: list[Row] = []
    path: list[str] = []
    for number, line in text_lines(page):
        if match := re.match(r"(#{2,6})\s+(.*)", line):
            level = len(match[1]) - 2
            path = [*path[:level], match[2].replace("`", "")]
        elif line.startswith("| `"):
            cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            found.append((" > ".join(path[:depth]), cells, number))
    return found


def compare(
    page: Path, expected: dict[tuple[str, str], list[str]], what: str, *, under: Callable[[str], str] = lambda h: h
) -> Iterator[Complaint]:
    """expected: (heading, first cell) -> the cells that must follow it; the last column of a row is free text."""
    if not page.exists():
        yield f"{where(page)}: there is no such page; it must name every {what}"
        return
    headings = {heading for heading, _ in expected}  # tables of other things may stand elsewhere on the page
    seen: set[tuple[str, str]] = set()
    for heading, cells, number in rows(page):
        key = (under(heading), cells[0].strip("`"))
        if key[0] not in headings:
            continue
        if key not in expected:
            yield f"{where(page, number)}: {cells[0]} ({heading}) is no {what} that the code knows"
            continue
        seen.add(key)
        given = [cell.replace("`", "") for cell in cells[1 : 1 + len(expected[key])]]
        if given != expected[key]:
            yield f"{where(page, number)}: {cells[0]} says {given}; the code says {expected[key]}"
        if len(cells) != 2 + len(expected[key]) or not cells[-1]:
            yield f"{where(page, number)}: {cells[0]} needs {len(expected[key])} columns and its meaning"
    for heading, name in expected:
        if (heading, name) not in seen:
            row = " | ".join([f"`{name}`", *expected[heading, name]]).replace("| |", "| |")
            yield f"{where(page)}: under {heading!r} the {what} is missing: | {row} | ... |"


# --- settings


def check_settings() -> Iterable[Complaint]:
    from helexa.core import config
    from helexa.core.catalogue import Catalogue, ModelProfile
    from helexa.core.lifecycle import ServingProfile

    expected: dict[tuple[str, str], list[str]] = {}
    expected.update(_settings("cortex.toml", config.CortexSettings))
    expected.update(_settings("neuron.toml", config.NeuronSettings, leave_out=set(ServingProfile.__struct_fields__)))
    expected.update(_settings("models.toml", Catalogue))
    assert ("models.toml > [[models]]", ModelProfile.__struct_fields__[0]) in expected
    return compare(REFERENCE / "settings.md", expected, "setting")


def _settings(
    file: str, schema: type[msgspec.Struct], at: str = "", leave_out: set[str] | None = None
) -> Iterator[tuple[tuple[str, str], list[str]]]:
    from helexa.core.settings_file import describe, list_item, struct_of

    for field in msgspec.structs.fields(schema):
        item = list_item(field.type)
        if (section := struct_of(field.type)) is not None:
            yield from _settings(file, section, f"{at} {field.name}" if at else f"[{field.name}]")
        elif item is not None and (entry := struct_of(item)) is not None:
            yield from (
                found
                for found in _settings(file, entry, f"[[{field.name}]]")
                if leave_out is None or found[0][1] not in leave_out
            )
        else:
            key = (f"{file} > {at or 'Above the first table'}", field.name)
            yield key, [_default(field), describe(field.type)]


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
    if value is None:
        return "left out"
    return msgspec.json.encode(value).decode().replace(",", ", ") if not isinstance(value, str) else f'"{value}"'


# --- endpoints


def check_endpoints() -> Iterable[Complaint]:
    import helexa.cortex.app as cortex
    import helexa.neuron.app as neuron
    from helexa.core.catalogue import Catalogue
    from helexa.core.config import CortexSettings, Gateway, NeuronSettings
    from helexa.neuron.serve import ENDPOINTS, Neuron

    gateway = cortex.build(CortexSettings(gateway=Gateway(metrics_on_api=True)), Catalogue())
    node = Neuron(NeuronSettings(), {})
    assert isinstance(node._plane, neuron.ControlPlane)
    expected: dict[tuple[str, str], list[str]] = {}
    for program, plane, endpoints in (
        ("cortex", gateway.control, cortex.ENDPOINTS),
        ("neuron", node._plane, ENDPOINTS),
    ):
        for route in plane._app.routes:
            path = re.sub(r"\{\w+:path\}", "{id}", route.path)
            for method in sorted(route.methods - {"HEAD"}):
                expected[program, f"{method} {path}"] = []
        for endpoint in endpoints:
            expected[program, f"POST {endpoint.path}"] = []
    return compare(REFERENCE / "http.md", expected, "endpoint", under=lambda h: h.split(" > ")[0])


# --- errors


def check_errors() -> Iterable[Complaint]:
    expected: dict[tuple[str, str], list[str]] = {}
    for cls, code in [*((c, c.code) for c in _error_classes()), *_instance_codes()]:
        transient = "yes" if _is_transient(cls) else "no"
        said = [f"{cls.status} {cls.type}", f"{cls.anthropic_status} {cls.anthropic_type}", transient]
        expected.setdefault(("Codes", code), said)
    return compare(REFERENCE / "errors.md", expected, "error code", under=lambda h: h.split(" > ")[0])


def _error_classes() -> list[type[Any]]:
    """HelexaError and everything under it, those of all modules: importing a module is what defines its classes."""
    import helexa
    from helexa.core.errors import HelexaError

    for module in pkgutil.walk_packages(helexa.__path__, "helexa."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as err:
            if err.name is None or err.name.startswith("helexa"):
                raise
            # It needs an extra that the checks come without. What callers are told is defined where no engine is.
    found: list[type[Any]] = [HelexaError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return found


def _is_transient(cls: type[Any]) -> bool:
    from helexa.core.errors import RateLimited, Transient

    return issubclass(cls, Transient | RateLimited)


def _instance_codes() -> Iterator[tuple[type[Any], str]]:
    """Codes that are given where an error is made: Conflict(..., code="model_in_use")."""
    by_name = {cls.__name__: cls for cls in _error_classes()}
    for source in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            for keyword in node.keywords:
                if keyword.arg == "code" and name in by_name and isinstance(keyword.value, ast.Constant):
                    yield by_name[name], str(keyword.value.value)


# --- metrics


def check_metrics() -> Iterable[Complaint]:
    from helexa.cortex.metrics import Metrics as CortexMetrics
    from helexa.neuron.kv.store import Figures
    from helexa.neuron.metrics import Metrics as NeuronMetrics

    node = NeuronMetrics(models=list, devices=list, health=list, kv=Figures)
    expected: dict[tuple[str, str], list[str]] = {}
    for program, families in (("cortex", CortexMetrics().families({})), ("neuron", node.collect())):
        for family in families:
            name = f"{family.name}_total" if family.type == "counter" else family.name
            expected[program, name] = [family.type, ", ".join(family._labelnames)]
    return compare(REFERENCE / "metrics.md", expected, "metric", under=lambda h: h.split(" > ")[0])


# --- the command line

BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
COMMANDS = REFERENCE / "command-line.md"


def check_commands() -> Iterator[Complaint]:
    if not COMMANDS.exists():
        yield f"{where(COMMANDS)}: there is no such page; it must name every command"
    elif _with_commands(COMMANDS.read_text("utf-8")) != COMMANDS.read_text("utf-8"):
        yield f"{where(COMMANDS)}: a command line has changed; run tools/check_docs.py --write"


def write_commands() -> None:
    COMMANDS.write_text(_with_commands(COMMANDS.read_text("utf-8")), "utf-8")


def _with_commands(text: str) -> str:
    return BLOCK.sub(lambda m: f"{m[1]}\n{_commands(m[2])}{m[3]}", text)


def _commands(program: str) -> str:
    """The commands of one program, each with its arguments and options."""
    import typer

    group: Any = typer.main.get_command(importlib.import_module(f"helexa.{program}.cli").app)
    parts = []
    for name, command in group.commands.items():
        if command.hidden:
            continue
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = " ".join([program, name, *(_metavar(a) for a in arguments)])
        lines = [f"### `{usage}`", "", command.help or "", ""]
        if params := [*arguments, *options]:
            lines += ["| | |", "|---|---|", *(_parameter(p) for p in params), ""]
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def _metavar(argument: Any) -> str:
    name = str(argument.name).upper()
    return name if argument.required else f"[{name}]"


def _parameter(param: Any) -> str:
    if param.param_type_name == "argument":
        name = f"`{_metavar(param).strip('[]')}`"
    else:
        flags = ", ".join(f"`{flag}`" for flag in [*param.opts, *param.secondary_opts])
        name = flags if param.is_flag else f"{flags} VALUE"
    words = param.help or ""
    if param.envvar:
        words += f" Also `${param.envvar}`."
    if not isinstance(param.default, bool) and isinstance(param.default, str | int | float):
        words += f" Default: `{param.default}`."
    return f"| {name} | {words.strip()} |"


CHECKS = (
    check_links,
    check_that_pages_are_reached,
    check_settings,
    check_endpoints,
    check_errors,
    check_metrics,
    check_commands,
)

if __name__ == "__main__":
    sys.exit(main())
