"""GGUF headers, read strictly and within bounds: what a file says about itself, and whether it is all there.

A header may lie (downloads break off, files are damaged): no count or length in it is believed further than the file
is long, so that none can make us allocate or loop. Nothing is imported for it: `gguf` brings numpy, which costs the
daemon 30 MB. The engine itself refuses a bad file without a reason; here every refusal has one.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

MAGIC: Final = b"GGUF"
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMS: Final = 4  # GGML_MAX_DIMS
MAX_NAME: Final = 64  # GGML_MAX_NAME
# Far above any real file (3,000 tensors, 60 keys, a vocabulary of 262,144), far below what would take a second to walk.
MAX_TENSORS: Final = 1 << 18
MAX_KEYS: Final = 1 << 14
MAX_KEY_BYTES: Final = 1 << 16  # the format's own limit
MAX_STRINGS: Final = 1 << 22  # elements of one array of strings
MAX_STRING_BYTES: Final = 1 << 24  # a chat template is some 10 kB
MAX_ELEMENTS_KEPT: Final = 4096  # elements of an array that is kept; longer ones (the tokenizer's) are only counted
MAX_STRINGS_KEPT: Final = 64
# How much of a file is read for its header, in two attempts: the longest known is 13 MB. Read and not mapped, since a
# file that shrinks while it is mapped kills the process that looks at it (SIGBUS).
FIRST_READ: Final = 8 << 20
LAST_READ: Final = 64 << 20

# ggml type -> (name, elements per block, bytes per block). 9 (Q8_1) is never stored.
TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_SCALARS: Final[dict[int, struct.Struct]] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: _U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: _U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING: Final = 8
_ARRAY: Final = 9

_PART: Final = re.compile(r"^(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")


class BadFile(ValueError):
    """This file is no whole GGUF model. The message names the file, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """offset is from the file's beginning, size in bytes; shape as in the file (the fastest dimension first)."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    size: int

    @property
    def type_name(self) -> str:
        return TYPES[self.type][0]

    @property
    def elements(self) -> int:
        n = 1
        for dim in self.shape:
            n *= dim
        return n


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says. `metadata` has scalars and short arrays; `lengths` has every array's length."""

    path: Path
    version: int
    metadata: dict[str, Any]
    lengths: dict[str, int]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    size_bytes: int


class _ReadMore(Exception):
    """The header goes on beyond what has been read of the file."""


class _Cursor:
    """Goes forward through the file's beginning. To go past the file's end is a BadFile, past `data` a _ReadMore."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size
        self.at = 0

    def bad(self, what: str) -> BadFile:
        return BadFile(f"{self.path}: {what}")

    def cut_off(self) -> Exception:
        if len(self.data) < min(self.size, LAST_READ):
            return _ReadMore()
        if self.size > LAST_READ:
            return self.bad(f"its header is longer than {LAST_READ >> 20} MB: it is damaged")
        return self.bad(f"the file ends within its header, after {self.size} bytes: download it again")

    def scalar(self, shape: struct.Struct) -> Any:
        try:
            (value,) = shape.unpack_from(self.data, self.at)
        except struct.error:
            raise self.cut_off() from None
        self.at += shape.size
        return value

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise self.cut_off()
        self.at += count

    def text(self, limit: int, what: str) -> str:
        length = self.scalar(_U64)
        if length > limit:
            raise self.bad(f"{what} claims {length} bytes, more than any real one has: the header is damaged")
        start = self.at
        self.skip(length)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{what} is not text: the header is damaged") from None

    def skip_strings(self, count: int) -> None:
        # A vocabulary has 262,144 of them, twice with its merges: nothing but the lengths is touched.
        data, at, read = self.data, self.at, _U64.unpack_from
        try:
            for _ in range(count):
                at += 8 + read(data, at)[0]
        except (struct.error, OverflowError):
            raise self.cut_off() from None
        if at > len(data):
            raise self.cut_off()
        self.at = at

    def array(self, key: str) -> tuple[int, list[Any] | None]:
        """(length, elements or None where there are too many to keep)."""
        kind = self.scalar(_U32)
        count = self.scalar(_U64)
        if kind == _STRING:
            if count > MAX_STRINGS or count * 8 > self.size - self.at:
                raise self.bad(f"{key} claims {count} strings, more than the file could hold: the header is damaged")
            if count <= MAX_STRINGS_KEPT:
                return count, [self.text(MAX_STRING_BYTES, key) for _ in range(count)]
            self.skip_strings(count)
            return count, None
        shape = _SCALARS.get(kind)
        if shape is None:
            raise self.bad(
                f"{key} is an array of an unknown type ({kind}): the header is damaged, or newer than we are"
            )
        if count * shape.size > self.size - self.at:
            raise self.bad(f"{key} claims {count} elements, more than the file could hold: the header is damaged")
        if count <= MAX_ELEMENTS_KEPT:
            return count, [self.scalar(shape) for _ in range(count)]
        self.skip(count * shape.size)
        return count, None


def read_header(path: Path) -> Header:
    """The header of one file, every tensor's range checked against the file's size.

    Raises BadFile, and OSError where the file cannot be opened.
    """
    return _reading(path, _read)


def raw_metadata(path: Path) -> dict[str, bytes]:
    """Each key with its value as they stand in the file (name, type, value), to be copied. Raises as read_header."""
    return _reading(path, _read_raw)


def _reading(path: Path, read: Callable[[_Cursor], T]) -> T:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            raise BadFile(f"{path}: the file is empty: download it again")
        for limit in (FIRST_READ, LAST_READ):
            file.seek(0)
            data = file.read(min(size, limit))
            _check_magic(path, data[:64])
            try:
                return read(_Cursor(path, data, size))
            except _ReadMore:
                continue
    raise BadFile(f"{path}: the file shrank while it was read")


def _check_magic(path: Path, start: bytes) -> None:
    if start[:4] == MAGIC:
        return
    if start.startswith(b"version https://git-lfs"):
        found = "it is a Git LFS pointer, not the model itself: fetch it with `git lfs pull`"
    elif start.lstrip()[:1] == b"<":
        found = "it is a web page, not a model: the download went wrong"
    elif start[:4] in (b"lmgg", b"tjgg", b"fmgg", b"algg"):
        found = "it is in a format from before GGUF: convert the model again with a current llama.cpp"
    elif start[:4] == MAGIC[::-1]:
        found = "it is written for big-endian machines: convert it, or download the little-endian one"
    else:
        found = f"it does not begin with GGUF (but {start[:4]!r})"
    raise BadFile(f"{path}: not a GGUF file: {found}")


def _counts(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, tensors and keys."""
    cursor.skip(4)
    version = cursor.scalar(_U32)
    if version & 0xFFFF == 0:
        raise cursor.bad("it is written for big-endian machines: convert it, or download the little-endian one")
    if version == 1:
        raise cursor.bad("GGUF version 1 is no longer read: convert the model again with a current llama.cpp")
    if version not in (2, 3):
        raise cursor.bad(f"GGUF version {version} is not known (2 and 3 are): a newer helexa may read it")
    tensor_count = cursor.scalar(_U64)
    key_count = cursor.scalar(_U64)
    size = cursor.size
    if tensor_count > min(MAX_TENSORS, size // 24) or key_count > min(MAX_KEYS, size // 13):
        raise cursor.bad(
            f"the header claims {tensor_count} tensors and {key_count} keys, more than a file of {size} bytes could "
            "hold: it is damaged, download it again"
        )
    return version, tensor_count, key_count


def _value(cursor: _Cursor, key: str) -> tuple[Any, int | None]:
    """(value, None), or (elements, or None where there are too many to keep; their number)."""
    kind = cursor.scalar(_U32)
    if kind == _STRING:
        return cursor.text(MAX_STRING_BYTES, key), None
    if kind == _ARRAY:
        count, kept = cursor.array(key)
        return kept, count
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind]), None
    raise cursor.bad(f"{key} has an unknown type ({kind}): the header is damaged, or newer than we are")


def _read_raw(cursor: _Cursor) -> dict[str, bytes]:
    _, _, key_count = _counts(cursor)
    raw = {}
    for _ in range(key_count):
        start = cursor.at
        key = cursor.text(MAX_KEY_BYTES, "a key")
        _value(cursor, key)
        raw[key] = cursor.data[start : cursor.at]
    return raw


def _read(cursor: _Cursor) -> Header:
    version, tensor_count, key_count = _counts(cursor)
    metadata: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for _ in range(key_count):
        key = cursor.text(MAX_KEY_BYTES, "a key")
        if key in metadata or key in lengths:
            raise cursor.bad(f"the key {key} stands there twice: the header is damaged")
        value, length = _value(cursor, key)
        if length is not None:
            lengths[key] = length
        if length is None or value is not None:
            metadata[key] = value

    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.bad(f"general.alignment is {alignment!r}, not a power of two: the header is damaged")
    raw = [_read_tensor(cursor) for _ in range(tensor_count)]
    data_offset = _padded(cursor.at, alignment)
    tensors = _place(cursor, raw, data_offset, alignment)
    return Header(cursor.path, version, metadata, lengths, tensors, data_offset, cursor.size)


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset from the beginning of the data)."""
    name = cursor.text(MAX_NAME, "a tensor's name")
    dims = cursor.scalar(_U32)
    if dims > MAX_DIMS:
        raise cursor.bad(f"the tensor {name} claims {dims} dimensions: the header is damaged")
    shape = tuple(cursor.scalar(_U64) for _ in range(dims))
    return name, shape, cursor.scalar(_U32), cursor.scalar(_U64)


def _place(
    cursor: _Cursor, raw: list[tuple[str, tuple[int, ...], int, int]], data_offset: int, alignment: int
) -> tuple[TensorInfo, ...]:
    """Every tensor follows the one before, as the engine demands, and ends within the file."""
    tensors = []
    expected = 0
    names = set()
    for name, shape, kind, offset in raw:
        if name in names:
            raise cursor.bad(f"the tensor {name} stands there twice: the header is damaged")
        names.add(name)
        if kind not in TYPES:
            raise cursor.bad(f"the tensor {name} has the type {kind}, which is not known: a newer helexa may read it")
        _, block, block_bytes = TYPES[kind]
        elements = 1
        for dim in shape:
            elements *= dim
        if shape and shape[0] % block:
            raise cursor.bad(
                f"the rows of tensor {name} have {shape[0]} elements, not a multiple of {block}: the header is damaged"
            )
        if offset != expected:
            raise cursor.bad(
                f"the tensor {name} is said to begin at {offset}, not at {expected}: the header is damaged"
            )
        size = elements // block * block_bytes
        tensors.append(TensorInfo(name, shape, kind, data_offset + offset, size))
        expected = _padded(offset + size, alignment)
    if tensors:
        end = tensors[-1].offset + tensors[-1].size
        if end > cursor.size:
            raise cursor.bad(f"the model needs {end} bytes, the file has {cursor.size}: download it again")
    return tuple(tensors)


def _padded(n: int, alignment: int) -> int:
    return (n + alignment - 1) // alignment * alignment


def parts_of(first: Path) -> tuple[Path, ...]:
    """All parts that a split model's file belongs to, by the names; the file alone where it is no part."""
    match = _PART.match(first.name)
    if match is None:
        return (first,)
    stem, count = match["stem"], int(match["count"])
    if not 1 <= count <= 4096:
        return (first,)
    return tuple(first.with_name(f"{stem}-{no:05}-of-{count:05}.gguf") for no in range(1, count + 1))


def read_model(files: tuple[Path, ...]) -> tuple[Header, ...]:
    """The headers of a model's files, all parts, the first one first. Raises BadFile as soon as one is not right.

    The engine finds the further parts by the first one's name, so they must lie beside it under the names it expects.
    """
    headers = tuple(read_header(path) for path in files)
    first = headers[0]
    count = first.metadata.get("split.count", 1)
    if count <= 1 and len(headers) == 1:
        return headers
    expected = parts_of(first.path)
    if len(expected) != count or [h.path.name for h in headers] != [p.name for p in expected]:
        missing = [p.name for p in expected if p.name not in {h.path.name for h in headers}]
        what = f"missing: {', '.join(missing)}" if missing else "the files' names do not say so (…-00001-of-…)"
        raise BadFile(f"{first.path}: the model is split into {count} files; {what}")
    for no, header in enumerate(headers):
        if header.metadata.get("split.no") != no or header.metadata.get("split.count") != count:
            raise BadFile(f"{header.path}: it says that it is another part than its name says: download it again")
    total = sum(len(h.tensors) for h in headers)
    claimed = first.metadata.get("split.tensors.count", total)
    if claimed != total:
        raise BadFile(
            f"{first.path}: the parts hold {total} tensors, the first one speaks of {claimed}: download again"
        )
    return headers
