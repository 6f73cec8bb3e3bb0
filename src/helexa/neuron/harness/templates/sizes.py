"""How large the result of a filter, a method or an operator may become, told before it runs. Pure.

Only what can give far more than it was given is here (padding, repeating, replacing, formatting); all else is at most
a small multiple of its input, which has been paid for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from helexa.neuron.harness.templates.budget import BITS, Budget, TooExpensive

_FIELD: Final = 10_000  # characters that one field of a format string may be padded to: its width has four digits
_WIDE_PERCENT: Final = re.compile(r"%[^%a-zA-Z]*(\*|\d{5})")
_WIDE_BRACES: Final = re.compile(r"\{[^{}]*(:[^{}]*\{|\d{5})")
_WIDE_TIME: Final = re.compile(r"\d{3}")

Args = Sequence[Any]
Options = Mapping[str, Any]
Estimate = Callable[[Budget, Any, Args, Options], int]  # value, and the other arguments


def _int(args: Args, options: Options, place: int, name: str, default: int = 0) -> int:
    value = args[place] if len(args) > place else options.get(name, default)
    return abs(value) if isinstance(value, int) else default


def _text(args: Args, options: Options, place: int, name: str) -> str:
    value = args[place] if len(args) > place else options.get(name, "")
    return value if isinstance(value, str) else ""


def _padded(budget: Budget, value: Any, args: Args, options: Options) -> int:
    return budget.weight(value) + _int(args, options, 0, "width")


def _tabs(budget: Budget, value: Any, args: Args, options: Options) -> int:
    return budget.weight(value) * (1 + _int(args, options, 0, "tabsize", 8))


def _replaced(budget: Budget, value: Any, args: Args, options: Options) -> int:
    if len(args) < 2:
        return budget.weight(value)
    old, new = args[0], args[1]
    text = value if isinstance(value, (str, bytes)) else ""
    try:
        found: int = text.count(old)
    except TypeError:
        found = len(text) + 1
    return len(text) + found * budget.weight(new)


def _joined(budget: Budget, value: Any, args: Args, options: Options) -> int:
    """value: the separator's place is the second for the filter, see _filter_joined."""
    items = args[0] if args else ()
    if not isinstance(items, (list, tuple, dict)):
        return 0  # a generator: its items are charged as they come
    return budget.weight(items) + len(items) * budget.weight(value)


def _filter_joined(budget: Budget, value: Any, args: Args, options: Options) -> int:
    return _joined(budget, _text(args, options, 0, "d"), [value], {})


def _translated(budget: Budget, value: Any, args: Args, options: Options) -> int:
    table = args[0] if args and isinstance(args[0], dict) else {}
    return len(value) * (1 + max((budget.weight(v) for v in table.values()), default=0))


def _indented(budget: Budget, value: Any, args: Args, options: Options) -> int:
    width = args[0] if args else options.get("width", 4)
    each = len(width) if isinstance(width, str) else abs(width) if isinstance(width, int) else 0
    text = value if isinstance(value, str) else ""
    return budget.weight(value) + (len(text.splitlines()) + 1) * each


def _wrapped(budget: Budget, value: Any, args: Args, options: Options) -> int:
    return budget.weight(value) * (1 + len(_text(args, options, 2, "wrapstring")))


def _json(budget: Budget, value: Any, args: Args, options: Options) -> int:
    indent = args[1] if len(args) > 1 else options.get("indent")
    each = len(indent) if isinstance(indent, str) else abs(indent) if isinstance(indent, int) else 0
    separators = args[2] if len(args) > 2 else options.get("separators")
    return budget.weight(value) * (1 + each) + budget.weight(value) * (budget.weight(separators) if separators else 0)


def _filled(budget: Budget, value: Any, args: Args, options: Options) -> int:
    return 64 * max(_int(args, options, 0, "linecount"), _int(args, options, 0, "slices"))


def _rounded(budget: Budget, value: Any, args: Args, options: Options) -> int:
    if _int(args, options, 0, "precision") > 1_000:
        raise TooExpensive("it rounds to more than 1,000 places")
    return 0


def _pretty(budget: Budget, value: Any, args: Args, options: Options) -> int:
    return budget.weight(value) * 16


def _filter_percent(budget: Budget, value: Any, args: Args, options: Options) -> int:
    return percent_formatted(budget, value, dict(options) or tuple(args)) if isinstance(value, str) else 0


FILTERS: Final[dict[str, Estimate]] = {
    "center": _padded,
    "format": _filter_percent,
    "indent": _indented,
    "join": _filter_joined,
    "pprint": _pretty,
    "replace": _replaced,
    "round": _rounded,
    "slice": _filled,
    "batch": _filled,
    "tojson": _json,
    "wordwrap": _wrapped,
}

METHODS: Final[dict[str, Estimate]] = {  # of str and bytes
    "center": _padded,
    "expandtabs": _tabs,
    "join": _joined,
    "ljust": _padded,
    "replace": _replaced,
    "rjust": _padded,
    "translate": _translated,
    "zfill": _padded,
}


def percent_formatted(budget: Budget, text: str | bytes, values: Any) -> int:
    pattern = text if isinstance(text, str) else text.decode("latin-1")
    if _WIDE_PERCENT.search(pattern):
        raise TooExpensive("it formats with a width beyond four digits")
    return len(pattern) + pattern.count("%") * max(_FIELD, 4 * budget.weight(values))


def brace_formatted(budget: Budget, text: str, values: Any) -> int:
    if _WIDE_BRACES.search(text):
        raise TooExpensive("it formats with a width beyond four digits")
    return len(text) + text.count("{") * max(_FIELD, 4 * budget.weight(values))


def check_time_format(text: str) -> None:
    if len(text) > 256 or _WIDE_TIME.search(text):
        raise TooExpensive("it asks for a time in a format that is too long")


def multiplied(budget: Budget, left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > BITS:
            raise TooExpensive(f"it makes a number of more than {BITS} bits")
        return 0
    times, what = (left, right) if isinstance(left, int) else (right, left)
    return max(times, 0) * budget.weight(what) if isinstance(times, int) and not isinstance(what, float) else 0


def check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * max(right, 0) > BITS:
        raise TooExpensive(f"it makes a number of more than {BITS} bits")
