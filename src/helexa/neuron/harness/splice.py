"""Changes to a JSON object's bytes without writing it anew: every number, escape and space elsewhere stays. Pure.

An absent key goes right after the first `{`, a present one is replaced by its span. The body must be known to be a
JSON object (the caller has decoded it); on anything else the result is meaningless, not an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec

_MARK = re.compile(rb'["{}\[\],:]')
_SPACE = b" \t\r\n"


def members(body: bytes) -> Iterator[tuple[str, int, int]]:
    """The object's own members: key, and the half-open span of its value."""
    depth = 0
    key: bytes | None = None
    start = 0  # of the value, once its colon was seen
    mark = _MARK.search(body)
    while mark is not None:
        at = mark.start()
        token = body[at]
        after = at + 1
        if token == 0x22:  # a string, skipped whole: its braces are text
            after = _string_end(body, at)
            if depth == 1 and not start:
                key = body[at:after]
        elif token in b"{[":
            depth += 1
        elif depth == 1 and token in b",}":
            if key is not None:
                yield _text(key), *_trim(body, start, at)
            if token == 0x7D:
                return
            key, start = None, 0
        elif token in b"}]":
            depth -= 1
        elif depth == 1 and not start:
            start = after  # the colon
        mark = _MARK.search(body, after)


def _string_end(body: bytes, at: int) -> int:
    """Behind the string that opens at `at`. By `find`, not by pattern: a prompt is tens of kilobytes."""
    while True:
        at = body.index(b'"', at + 1)
        slashes = at
        while body[slashes - 1] == 0x5C:
            slashes -= 1
        if (at - slashes) % 2 == 0:
            return at + 1


def splice(body: bytes, values: Mapping[str, bytes]) -> bytes:
    """`body` with each key of `values` set to that raw JSON. Where a key stands twice, every one of them is set."""
    absent = dict(values)
    spans = []
    for key, start, end in members(body):
        if key in values:
            spans.append((start, end, values[key]))
            absent.pop(key, None)
    return prepend(_replace(body, spans), absent)


def _replace(body: bytes, spans: list[tuple[int, int, bytes]]) -> bytes:
    """`body` with each half-open span (in order, apart) replaced."""
    out: list[bytes] = []
    at = 0
    for start, end, value in spans:
        out += (body[at:start], value)
        at = end
    return b"".join((*out, body[at:]))


def prepend(body: bytes, values: Mapping[str, bytes]) -> bytes:
    """`body` with these members first. HOT for one key: no scan. Only for keys that are known to be absent."""
    if not values:
        return body
    at = body.index(b"{") + 1
    new = b",".join(b'"%b":%b' % (key.encode(), value) for key, value in values.items())
    rest = body[at:]
    return b"%b%b%b%b" % (body[:at], new, b"" if rest.lstrip(_SPACE).startswith(b"}") else b",", rest)


def _trim(body: bytes, start: int, end: int) -> tuple[int, int]:
    while start < end and body[start] in _SPACE:
        start += 1
    while end > start and body[end - 1] in _SPACE:
        end -= 1
    return start, end


def _text(key: bytes) -> str:
    return msgspec.json.decode(key, type=str) if b"\\" in key else key[1:-1].decode()
