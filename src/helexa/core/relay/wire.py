"""HTTP/1.1 as bytes: what of a head is refused, what of it passes, and how ours are written. Pure.

llhttp has validated every head before it comes here (strict: no folding, no bare LF or CR, one framing); this module
refuses what llhttp lets through and keeps the list of what passes. Whatever is not on the list does not pass.
"""

from __future__ import annotations

import re
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Final

from helexa.core.errors import (
    BadRequest,
    HeadTooLarge,
    HelexaError,
    UnsupportedMedia,
    VersionNotSupported,
)

MAX_HEAD_BYTES: Final = 32 << 10  # nginx: 4 x 8 kB; h11: 16 kB
MAX_HEADERS: Final = 100

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK: Final = b"0\r\n\r\n"
# nginx: a proxy between that buffers would hold back the stream (x-accel-buffering).
STREAM_HEADERS: Final = (
    b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
)

STATUS_LINES: Final[dict[int, bytes]] = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}

# Of an upstream's response head, these pass to the client; framing and connection are ours.
_PASSED_BACK: Final = re.compile(
    rb"\r\n((?:content-type|retry-after|cache-control|x-accel-buffering|x-helexa-[a-z-]+):[^\r\n]*)", re.IGNORECASE
)
PLAIN: Final = [b"host"]
_NOTED: Final = re.compile(rb"\n(host|transfer-encoding|expect|content-encoding|x-request-id|traceparent):")
_LEAST_LINE: Final = len(b"a:\r\n")
_CONTENT_TYPE: Final = re.compile(rb"(?im)^content-type:[^\r\n]*\r\n")
_GOOD_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def status_line(status: int) -> bytes:
    return STATUS_LINES.get(status) or f"HTTP/1.1 {status} Status\r\n".encode()


def value_of(head: bytes, lower: bytes, name: bytes) -> bytes | None:
    """A header's value; None where absent. lower: head in lower case; name: lower case, with its colon."""
    at = lower.find(b"\r\n" + name)
    if at < 0:
        return None
    start = at + 2 + len(name)
    return head[start : head.index(b"\r\n", start)].strip(b" \t")


def noted(lower: bytes) -> list[bytes]:
    """Of a head in lower case, the names of the lines that want a closer look, in their order. `PLAIN` for most heads:
    the others are sent by few clients. HOT: one search for all of them costs what one `in` costs."""
    return _NOTED.findall(lower)


def refusal(head: bytes, lower: bytes, version: str, *, upgrade: bool, noted: list[bytes]) -> HelexaError | None:
    """Why a validated request head is refused all the same; None if it is not. HOT.

    head ends with its blank line; noted: what `noted` says of it.
    """
    if version not in ("1.1", "1.0"):
        return VersionNotSupported(f"HTTP/{version} is not spoken here; use HTTP/1.1")
    size = len(head)
    if size > MAX_HEAD_BYTES or (size > MAX_HEADERS * _LEAST_LINE and head.count(b"\n") > MAX_HEADERS + 2):
        return HeadTooLarge(f"The request's head is over {MAX_HEAD_BYTES >> 10} kB or {MAX_HEADERS} headers")
    if noted != PLAIN:
        hosts = noted.count(b"host")
        if hosts > 1 or (not hosts and version == "1.1"):
            return BadRequest("A request needs exactly one Host header")
    if upgrade or head.startswith(b"CONNECT "):
        return BadRequest("Upgrade and CONNECT are not supported here")
    if noted == PLAIN:
        return None
    if b"transfer-encoding" in noted:
        if version == "1.0":
            return VersionNotSupported("Transfer-Encoding does not exist in HTTP/1.0; use HTTP/1.1")
        if noted.count(b"transfer-encoding") > 1 or value_of(head, lower, b"transfer-encoding:") != b"chunked":
            return BadRequest("Transfer-Encoding: only a single `chunked` is understood")
    if b"expect" in noted and value_of(lower, lower, b"expect:") != b"100-continue":
        return BadRequest("Expect: only 100-continue is understood")
    if b"content-encoding" in noted:
        encoding = value_of(lower, lower, b"content-encoding:") or b""
        if encoding not in (b"", b"identity"):
            return UnsupportedMedia(
                f"Bodies compressed with {encoding.decode('latin-1')} are not read; send plain JSON"
            )
    return None


def good_request_id(value: bytes | None) -> bool:
    """The caller's own id is kept where it is harmless: 1 to 128 of [A-Za-z0-9._-]."""
    return value is not None and _GOOD_ID.fullmatch(value) is not None


@lru_cache(maxsize=256)  # the heads of a node's streams are all the same
def answer_head(head: bytes) -> tuple[bytes, bytes, bytes | None, bool]:
    """An upstream's head as the client gets it: status line and the header lines that pass, each ending in CRLF;
    then its content-type and content-length (None where absent), and whether it comes in chunks."""
    lower = head.lower()
    passed = b"".join([line + b"\r\n" for line in _PASSED_BACK.findall(head)])
    return (
        status_line(int(head[9:12])) + passed,
        value_of(lower, lower, b"content-type:") or b"",
        value_of(lower, lower, b"content-length:"),
        b"\r\ntransfer-encoding:" in lower,
    )


def with_content_type(head: bytes, kind: bytes) -> bytes:
    """A head made by `answer_head`, with this content-type."""
    return _CONTENT_TYPE.sub(b"", head) + b"content-type: " + kind + b"\r\n"


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked body; empty data frames nothing (an empty chunk would end the body)."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def date_line() -> bytes:
    """A Date header, CRLF included (RFC 9110, 6.6.1). Made once a second by the sweeper."""
    return b"date: " + formatdate(usegmt=True).encode() + b"\r\n"
