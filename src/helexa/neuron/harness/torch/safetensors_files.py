"""What the safetensors files of a model folder hold, from their headers alone. Imports no torch.

A file is eight bytes of length, that many bytes of JSON (name -> dtype, shape, data_offsets), then the data. Everything
is checked before a byte of data is read, so that a load never fails half way for what could be seen at its start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from helexa.neuron.store.disk import NOT_JSON, weight_files

MAX_HEADER: Final = 100 << 20  # the format's own bound
INDEX: Final = "model.safetensors.index.json"
ELEMENT_BYTES: Final = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
READABLE: Final = ("F32", "BF16", "F16", "F64")


class NotWhole(ValueError):
    """The files are not what they should be. str() names the file, and the tensor where it is about one."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file."""

    file: Path
    dtype: str  # F32, BF16, ...
    shape: tuple[int, ...]


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model in this folder, by name. Raises NotWhole."""
    wanted = _read_index(folder)
    if wanted is None:
        try:
            names = weight_files([path.name for path in folder.iterdir()])
        except OSError as err:
            raise NotWhole(f"{folder} cannot be read: {err.strerror}") from err
        if not names:
            raise NotWhole(f"{folder} has no .safetensors file")
    else:
        names = sorted(set(wanted.values()))
    found: dict[str, Stored] = {}
    for name in names:
        path = folder / name
        if wanted is not None and not path.is_file():
            lost = [tensor for tensor, file in wanted.items() if file == name]
            raise NotWhole(f"{name} is not there; {INDEX} has {len(lost)} tensors in it, the first {lost[0]}")
        found.update(read_header(path))
    for tensor, name in (wanted or {}).items():
        if tensor not in found or found[tensor].file.name != name:
            raise NotWhole(f"{name} has no tensor {tensor}, which {INDEX} says it has")
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises NotWhole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(MAX_HEADER, size - 8):
                raise NotWhole(f"{path.name} is truncated, or no safetensors file: it has {size} bytes")
            head = file.read(length)
    except OSError as err:
        raise NotWhole(f"{path.name} cannot be read: {err.strerror}") from err
    try:
        raw = msgspec.json.decode(head, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except NOT_JSON as err:
        raise NotWhole(f"the header of {path.name} cannot be read: {err}") from err
    return {name: _checked(path, name, entry, size - 8 - length) for name, entry in entries.items()}


def _checked(path: Path, name: str, entry: _Entry, data_bytes: int) -> Stored:
    element = ELEMENT_BYTES.get(entry.dtype)
    if element is None:
        raise NotWhole(f"{path.name}: tensor {name} is of the dtype {entry.dtype}, which is not known")
    first, end = entry.data_offsets
    if any(n < 0 for n in entry.shape) or first < 0 or end - first != math.prod(entry.shape) * element:
        raise NotWhole(
            f"{path.name}: tensor {name} has {end - first} bytes, "
            f"{entry.dtype} of the shape {list(entry.shape)} would have {math.prod(entry.shape) * element}"
        )
    if end > data_bytes:
        raise NotWhole(
            f"{path.name} is truncated: tensor {name} ends at byte {end} of its data, which has {data_bytes}"
        )
    return Stored(path, entry.dtype, tuple(entry.shape))


def check(found: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Every wanted tensor is there, of its shape and of a dtype that can be read. Raises NotWhole."""
    for name, shape in wanted.items():
        stored = found.get(name)
        if stored is None:
            raise NotWhole(f"tensor {name} is in none of the model's files")
        if stored.shape != shape:
            raise NotWhole(
                f"{stored.file.name}: tensor {name} has the shape {list(stored.shape)}, config.json wants {list(shape)}"
            )
        if stored.dtype not in READABLE:
            raise NotWhole(
                f"{stored.file.name}: tensor {name} is {stored.dtype}; this engine reads {', '.join(READABLE)}"
            )


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except FileNotFoundError:
        return None
    except (OSError, *NOT_JSON) as err:
        raise NotWhole(f"{INDEX} cannot be read: {err}") from err
