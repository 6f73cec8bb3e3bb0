"""Server-sent events: framing them, and finding them in a stream however its bytes were cut.

Pure. A source of the rules: the WHATWG HTML standard, "Server-sent events". Only LF line ends are written; CR LF and
a leading byte order mark are understood.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_EVENT_BYTES = 16 << 20  # an event that long is no event: an image in base64 is the largest thing an engine sends


@dataclass(frozen=True, slots=True)
class Event:
    """One event, or one comment line block (`comment`), as it was dispatched."""

    name: str | None
    data: bytes
    comment: bool = False


class EventReader:
    """Bytes in, whole events out. Keeps an unfinished event until its blank line comes."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[Event]:
        """The events that are complete now. ValueError for one over MAX_EVENT_BYTES."""
        return [parse(block) for block in self.blocks(data)]

    def blocks(self, data: bytes) -> list[bytes]:
        """The same as raw blocks, each with its blank line."""
        self._buffer += data
        if b"\r" in self._buffer:
            held = self._buffer.endswith(b"\r")  # its LF may be in the next read
            text = self._buffer[:-1] if held else self._buffer
            self._buffer = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") + (b"\r" if held else b"")
        # one walk with an index: cutting the rest anew for each event is quadratic in a read of a thousand of them
        whole, begin = self._buffer, 0
        found: list[bytes] = []
        while (end := whole.find(b"\n\n", begin)) >= 0:
            found.append(whole[begin : end + 2])
            begin = end + 2
        self._buffer = whole[begin:]
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of over {MAX_EVENT_BYTES} bytes")
        return found

    @property
    def pending(self) -> bytes:
        """What came after the last whole event."""
        return self._buffer


def parse(block: bytes) -> Event:
    """One block, blank line included or not, as an event. A block of comments alone is a comment."""
    name: str | None = None
    data: list[bytes] = []
    comments: list[bytes] = []
    for line in block.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line:
            continue
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not field:
            comments.append(value)
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace")
    if not data and name is None:
        return Event(None, b"\n".join(comments), comment=True)
    return Event(name, b"\n".join(data))


def frame(data: bytes, name: str | None = None) -> bytes:
    """`data` (JSON: no newline in it) as one event."""
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + data + b"\n\n"


def comment(text: bytes = b"") -> bytes:
    """A comment, which clients skip; a heartbeat when empty. Newlines in `text` become spaces."""
    return b": " + text.replace(b"\r", b" ").replace(b"\n", b" ") + b"\n\n" if text else b":\n\n"
