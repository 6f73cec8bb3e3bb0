"""A settings file read strictly: TOML and environment in, a checked struct out, or every mistake told at once.

The struct is the schema: its fields are the known keys, their types and `msgspec.Meta` bounds the known values. What
types cannot say (duplicate names, addresses, loops) the caller checks and hands in as `rules`.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from helexa.core.errors import nearest

T = TypeVar("T", bound=msgspec.Struct)
Key = tuple[str | int, ...]  # ("neurons", 0, "endpoint")
Warn = Callable[[str], None]

_ENVIRONMENT = "environment"
_UNKNOWN = "is not a known key"
_NO_LIMIT = 2**31 - 1  # a bound that is there for the engine's integers, not for people
_SECRET = frozenset({"token"})  # never shown back


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. `key` is as a person reads it: `[gateway] listen`; empty where the file itself is at fault."""

    file: str
    key: str
    reason: str
    nearest: str | None = None

    def __str__(self) -> str:
        hint = f"; did you mean {self.nearest!r}?" if self.nearest else ""
        return f"{self.file}: {self.key} {self.reason}{hint}" if self.key else f"{self.file}: {self.reason}{hint}"


class ConfigError(Exception):
    """A settings file (or an override) that cannot be used. str() is the whole message for the user; exit code 2."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


@dataclass(frozen=True, slots=True)
class Fault:
    """What a rule found, before it is known whether the value came from the file or from the environment."""

    key: Key
    reason: str
    nearest: str | None = None


def read(
    schema: type[T],
    path: Path | None,
    *,
    env: Mapping[str, str] | None = None,
    prefix: str = "",
    not_settings: frozenset[str] = frozenset(),
    legacy: Callable[[Key], bool] = lambda key: False,
    idle: frozenset[tuple[str, ...]] = frozenset(),
    rules: Callable[[T], Iterable[Fault]] = lambda settings: (),
    warn: Warn,
) -> T:
    """Load `path` (None: nothing but defaults) into `schema`, with the variables that begin with `prefix` on top.

    not_settings:  variables with the prefix that mean something else
    legacy:        says of an unknown key that it is an old one, to be dropped with a warning
    idle:          known keys (list indices left out) that nothing acts on in this version; setting one is warned of
    """
    file = str(path) if path is not None else "settings"
    tree = _parse(path, file) if path is not None else {}
    from_env: dict[Key, str] = {}
    faults = list(_overlay(schema, tree, env or {}, prefix, not_settings, from_env))

    dropped: list[Key] = []
    faults += (_moved(schema, fault) for fault in _walk(schema, tree, (), legacy, dropped))
    if dropped:
        warn(f"{file}: {_these(dropped, tree)} not used by helexa; take the lines out")
        for key in dropped:
            _remove(key, tree)
    if not faults:
        settings = msgspec.convert(tree, schema)
        faults = list(rules(settings))
        if not faults:
            if without_effect := [key for key in _keys(tree) if tuple(p for p in key if isinstance(p, str)) in idle]:
                warn(f"{file}: {_these(without_effect, tree)} read, but this version does not act on it")
            return settings
    raise ConfigError(_problem(fault, file, tree, from_env, prefix) for fault in faults)


def _keys(tree: Any, at: Key = ()) -> Iterator[Key]:
    """Every key of the tree, those of its tables included."""
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for part, value in below:
        if isinstance(tree, dict):
            yield (*at, part)
        yield from _keys(value, (*at, part))


def _these(keys: list[Key], tree: dict[str, Any]) -> str:
    return ", ".join(f"`{show(key, tree)}`" for key in keys) + (" is" if len(keys) == 1 else " are")


def _remove(key: Key, tree: Any) -> None:
    for part in key[:-1]:
        tree = tree[part]
    del tree[key[-1]]


def _parse(path: Path, file: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError([Problem(file, "", "there is no such file")]) from None
    except OSError as err:
        raise ConfigError([Problem(file, "", f"cannot be read: {err.strerror or err}")]) from err
    except UnicodeDecodeError as err:
        raise ConfigError([Problem(file, "", f"is not UTF-8 (byte {err.start})")]) from err
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as err:  # ValueError: an integer of 5,000 digits
        raise ConfigError([Problem(file, "", f"is not TOML: {err or 'nested too deeply'}")]) from err


# --- the walk over keys and values


def _walk(
    schema: type[msgspec.Struct], table: dict[str, Any], at: Key, legacy: Callable[[Key], bool], dropped: list[Key]
) -> Iterable[Fault]:
    """Check one table, note its legacy keys, and go on into the tables below."""
    fields = {f.name: f for f in _fields(schema)}
    for name in table:
        key = (*at, name)
        if name in fields:
            yield from _check(fields[name].type, table[name], key, legacy, dropped)
        elif legacy(key):
            dropped.append(key)
        else:
            near = nearest(name, list(fields), 1)
            known = "" if near else f"; known here: {', '.join(fields)}"
            yield Fault(key, _UNKNOWN + known, near[0] if near else None)
    for field in fields.values():
        if field.required and field.name not in table:
            yield Fault((*at, field.name), f"is missing; it must be {describe(field.type)}")


def _moved(schema: type[msgspec.Struct], fault: Fault) -> Fault:
    """A known key in the wrong table is told its right one: `listen` at the top is `[gateway] listen`."""
    if not fault.reason.startswith(_UNKNOWN):
        return fault
    name = str(fault.key[-1])
    for field in _fields(schema):
        section = struct_of(field.type)
        if section is not None and field.name != fault.key[0] and name in section.__struct_fields__:
            return Fault(fault.key, _UNKNOWN, f"[{field.name}] {name}")
    if len(fault.key) > 1 and name in schema.__struct_fields__:
        return Fault(fault.key, f"{_UNKNOWN} here; it stands above the first table")
    return fault


def _check(type_: Any, value: Any, key: Key, legacy: Callable[[Key], bool], dropped: list[Key]) -> Iterable[Fault]:
    if (struct := struct_of(type_)) is not None:
        if isinstance(value, dict):
            yield from _walk(struct, value, key, legacy, dropped)
        else:
            yield Fault(key, f"must be a table, not {_shown(key, value)}")
        return
    if (item := list_item(type_)) is not None and isinstance(value, list):
        for index, element in enumerate(value):
            yield from _check(item, element, (*key, index), legacy, dropped)
        return
    if (entry := dict_value(type_)) not in (None, Any) and isinstance(value, dict):
        for name, element in value.items():
            yield from _check(entry, element, (*key, name), legacy, dropped)
        return
    try:
        msgspec.convert(value, type_)
    except msgspec.ValidationError:
        near = nearest(value, choices(type_), 1) if isinstance(value, str) else []
        yield Fault(key, f"must be {describe(type_)}, not {_shown(key, value)}", near[0] if near else None)
        return
    except (RecursionError, OverflowError):
        yield Fault(key, f"must be {describe(type_)}; this is nested too deeply or too large")
        return
    if not _finite(value):
        yield Fault(key, f"must be {describe(type_)}; inf and nan are not taken")


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return value - value == 0
    if isinstance(value, dict):
        return all(_finite(v) for v in value.values())
    if isinstance(value, list):
        return all(_finite(v) for v in value)
    return True


# --- the environment


def _overlay(
    schema: type[msgspec.Struct],
    tree: dict[str, Any],
    env: Mapping[str, str],
    prefix: str,
    not_settings: frozenset[str],
    from_env: dict[Key, str],
) -> Iterable[Fault]:
    """Put each override into the tree at its key; CORTEX_NEURONS before CORTEX_NEURONS__0__TOKEN."""
    if not prefix:
        return
    for variable in sorted(
        (v for v in env if v.startswith(prefix) and v not in not_settings), key=lambda v: (v.count("__"), v)
    ):
        key = tuple(int(p) if p.isdecimal() else p.lower() for p in variable[len(prefix) :].split("__"))
        from_env[key] = variable
        found = _locate(schema, tree, key)
        if isinstance(found, Fault):
            yield found
            continue
        container, type_ = found
        try:
            value = _from_text(env[variable], type_)
        except (msgspec.DecodeError, ValueError):
            near = nearest(env[variable], choices(type_), 1)
            plain = struct_of(type_) is None and list_item(type_) is None  # a structure may hold a token
            found_text = f", not {_shown(key, env[variable])}" if plain else ", written as JSON"
            yield Fault(key, f"must be {describe(type_)}{found_text}", near[0] if near else None)
            continue
        last: Any = key[-1]
        if value is None:  # empty: as if the key were not in the file
            if isinstance(container, dict):
                container.pop(last, None)
        else:
            container[last] = value


def _locate(schema: type[msgspec.Struct], tree: dict[str, Any], key: Key) -> tuple[Any, Any] | Fault:
    """The table or list that holds the key, made where it is absent, and the type that belongs there."""
    container: Any = tree
    type_: Any = schema
    for depth, part in enumerate(key):
        if (struct := struct_of(type_)) is not None and isinstance(container, dict):
            known = {f.name: f.type for f in _fields(struct)}
            if part not in known:
                near = nearest(str(part), list(known), 1)
                known_here = "" if near else f"; known here: {', '.join(known)}"
                hint = "__".join([*(str(p) for p in key[:depth]), near[0]]).upper() if near else None
                return Fault(key, f"is not a known setting{known_here}", hint)
            type_ = known[str(part)]
        elif (item := list_item(type_)) is not None and isinstance(container, list):
            if not isinstance(part, int) or part >= len(container):
                return Fault(key, f"names entry {part} of a list of {len(container)} (they count from 0)")
            type_ = item
        else:
            return Fault(key, "goes into a value that has no keys below it")
        if depth == len(key) - 1:
            return container, type_
        if isinstance(container, dict):
            container = container.setdefault(str(part), [] if list_item(type_) is not None else {})
        else:
            container = container[part]
    return Fault(key, "is not a known setting")


def _from_text(text: str, type_: Any) -> Any:
    """A variable's text as TOML would have given it; None for an empty text where the key may be left out."""
    optional = type(None) in get_args(type_)
    if not text and optional:
        return None
    item = list_item(type_)
    if item is not None and not text.lstrip().startswith("["):
        return [_from_text(part.strip(), item) for part in text.split(",")] if text.strip() else []
    if item is not None or struct_of(type_) is not None or _bare(type_) in (dict, Any):
        return msgspec.json.decode(text)
    if text.lower() == "null":  # msgspec would take it for "left out"
        text = text if _takes_text(type_) else "no value"
    return msgspec.convert(text, type_, strict=_takes_text(type_))


# --- types, as a person reads them


@functools.cache
def _fields(schema: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(schema)


def _options(type_: Any) -> tuple[Any, ...]:
    """The type without None, as the alternatives it has."""
    if get_origin(type_) in (Union, types.UnionType):
        return tuple(a for a in get_args(type_) if a is not type(None))
    return (type_,)


def _bare(type_: Any) -> Any:
    """The one type behind Optional and Annotated, generic parameters dropped."""
    inner = _options(type_)[0]
    if get_origin(inner) is Annotated:
        inner = get_args(inner)[0]
    return get_origin(inner) or inner


def struct_of(type_: Any) -> type[msgspec.Struct] | None:
    bare = _bare(type_)
    return bare if isinstance(bare, type) and issubclass(bare, msgspec.Struct) else None


def list_item(type_: Any) -> Any | None:
    """Type of a list's elements; None where the type is no list."""
    return get_args(_options(type_)[0])[0] if _bare(type_) is list else None


def dict_value(type_: Any) -> Any | None:
    """Type of the values of a table with names of the user's own; None where the type is no such table."""
    return get_args(_options(type_)[0])[1] if _bare(type_) is dict else None


def choices(type_: Any) -> list[str]:
    inner = _options(type_)[0]
    return [str(a) for a in get_args(inner)] if get_origin(inner) is Literal else []


def _takes_text(type_: Any) -> bool:
    return _bare(type_) is str or bool(choices(type_))


def describe(type_: Any) -> str:
    """`int | None` with bounds as "a whole number from 1 to 65,535". Also the range column of the reference."""
    inner, *others = _options(type_)
    if others:
        return " or ".join(describe(option) for option in (inner, *others))
    if words := choices(type_):
        return "one of " + ", ".join(f'"{w}"' for w in words)
    if (item := list_item(type_)) is not None:
        return f"a list, each {describe(item)}"
    bare = _bare(type_)
    meta = next((m for m in getattr(inner, "__metadata__", ()) if isinstance(m, msgspec.Meta)), None)
    nouns = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return nouns.get(bare, "a table") + _bounds(meta)


def _bounds(meta: msgspec.Meta | None) -> str:
    if meta is None:
        return ""
    if meta.min_length is not None:
        return " that is not empty"
    low = f"{meta.ge:,}" if meta.ge is not None else f"more than {meta.gt:,}" if meta.gt is not None else None
    if meta.le is None or meta.le >= _NO_LIMIT:
        return f", at least {low}" if meta.ge is not None else f", {low}" if low else ""
    high = f"{int(meta.le) if meta.le == int(meta.le) else meta.le:,}"
    if low is None:
        return f", at most {high}"
    return f" from {low} to {high}" if meta.ge is not None else f", {low} and at most {high}"


# --- keys and values, as a person reads them

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")


def _quoted(part: str | int) -> str:
    return str(part) if isinstance(part, int) or _PLAIN_KEY.fullmatch(part) else f'"{part}"'


def show(key: Key, tree: dict[str, Any]) -> str:
    """("neurons", 0, "endpoint") as `[[neurons]] "beast" endpoint`, ("port",) as `port`."""
    head, rest = key[0], key[1:]
    value = tree.get(str(head))
    if isinstance(value, list) and rest and isinstance(rest[0], int) and _is_table(value, rest[0]):
        label = _label(value[rest[0]]) or f"#{rest[0] + 1}"
        return f"[[{_quoted(head)}]] {label}{' ' if rest[1:] else ''}{_dotted(rest[1:])}"
    if rest and not isinstance(rest[0], int):
        return f"[{_quoted(head)}] {_dotted(rest)}"
    if not rest and isinstance(value, dict):
        return f"[{_quoted(head)}]"
    if not rest and isinstance(value, list) and _is_table(value, 0):
        return f"[[{_quoted(head)}]]"
    return _dotted(key)


def _is_table(value: list[Any], index: int) -> bool:
    return index < len(value) and isinstance(value[index], dict)


def _label(entry: dict[str, Any]) -> str | None:
    name = next((entry[k] for k in ("name", "id", "model_id", "model") if isinstance(entry.get(k), str)), None)
    return f'"{name}"' if name else None


def _dotted(key: Key) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{_quoted(part)}"
    return text


def _shown(key: Key, value: Any) -> str:
    if _SECRET.intersection(str(k) for k in key):
        return "what it is"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    if isinstance(value, str):
        text = f'"{value}"'
    if isinstance(value, dict):
        return "a table"
    return text if len(text) <= 60 else text[:57] + "..."


def _problem(fault: Fault, file: str, tree: dict[str, Any], from_env: dict[Key, str], prefix: str) -> Problem:
    """Name the place that the user wrote: the variable where one set this key (or a table around it), else the file."""
    for length in range(len(fault.key), 0, -1):
        if (variable := from_env.get(fault.key[:length])) is not None:
            below = _dotted(fault.key[length:])
            near = fault.nearest
            if near and fault.reason.startswith("is not a known setting"):
                near = prefix + near
            return Problem(_ENVIRONMENT, f"{variable}{' ' if below else ''}{below}", fault.reason, near)
    return Problem(file, show(fault.key, tree), fault.reason, fault.nearest)
