"""Models as they lie on disk: the folder of the operator (models_dir), and single paths. Reads names and sizes only."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from helexa.neuron.store import names

GGUF: Final = "gguf"
SAFETENSORS: Final = "safetensors"
OF_HARNESS: Final = {"llama": GGUF, "torch": SAFETENSORS}
_MAGIC: Final = b"GGUF"
# What msgspec raises for bytes that are not JSON of the type: also for bad UTF-8 in a string, and for deep nesting.
NOT_JSON: Final = (msgspec.MsgspecError, ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that is on this disk, under its canonical id. error says why it cannot be served as it lies there."""

    id: str
    files: tuple[Path, ...]  # all parts in order
    source: str  # what a load request would name: a path, or "owner/repo:QUANT"
    quant: str | None
    size_bytes: int
    stem: str = ""  # name in its folder or repository, without split suffix and ending; "" for a model folder
    repo: str | None = None  # of the Hub; None below models_dir
    projector: Path | None = None
    error: str | None = None


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder below root, root first, and its file names. Links to folders are followed, each folder once."""
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        try:
            stat = os.stat(folder)
        except OSError:
            folders.clear()
            continue
        if (stat.st_dev, stat.st_ino) in seen:  # a link back up
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        # A Hugging Face cache that lies below models_dir is read as what it is, not as folders.
        folders[:] = sorted(f for f in folders if not f.startswith((".", "models--")))
        yield Path(folder), sorted(files)


def in_folder(root: Path, folder: Path, files: Collection[str], formats: Collection[str]) -> list[StoredModel]:
    """The models of one folder. Ids are relative to root: "qwen/Qwen3-8B-Q4_K_M", and for a model folder "qwen"."""
    relative = "" if folder == root else folder.relative_to(root).as_posix()
    found = []
    if GGUF in formats:
        projectors = [f for f in files if names.is_projector(f)]
        models = names.group(files)
        for model in models:
            paths = tuple(folder / p for p in model.parts)
            found.append(
                StoredModel(
                    id=f"{relative}/{model.stem}".lstrip("/"),
                    files=paths,
                    source=str(paths[0]),
                    quant=model.quant,
                    size_bytes=size_of(paths),
                    stem=model.stem,
                    projector=_projector_beside(folder, model, models, projectors),
                    error=model.why_incomplete or why_not_gguf(paths),
                )
            )
    if SAFETENSORS in formats and "config.json" in files and (weights := weight_files(files)):
        paths = tuple(folder / w for w in weights)
        found.append(
            StoredModel(
                id=relative or folder.name,
                files=paths,
                source=str(folder),
                quant=None,
                size_bytes=size_of(paths),
                error=why_incomplete_folder(folder, files),
            )
        )
    return found


def weight_files(files: Collection[str]) -> list[str]:
    """The safetensors files that make the model; Mistral ships the same weights again as consolidated.*."""
    weights = sorted(f for f in files if f.endswith(".safetensors") and "/" not in f)
    usual = [f for f in weights if f.startswith("model")]
    return usual or weights


def why_incomplete_folder(folder: Path, files: Collection[str]) -> str | None:
    """By the index that lists the parts, where there is one."""
    if "model.safetensors.index.json" not in files:
        return None
    try:
        index = msgspec.json.decode((folder / "model.safetensors.index.json").read_bytes(), type=_Index)
    except (OSError, *NOT_JSON) as err:
        return f"model.safetensors.index.json cannot be read: {err}"
    missing = sorted(set(index.weight_map.values()) - set(files))
    return f"{', '.join(missing)} missing in {folder}" if missing else None


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def why_not_gguf(paths: Collection[Path]) -> str | None:
    """A look at the first bytes: an empty file, an HTML page saved as one, a Git LFS pointer. Not the whole check."""
    for path in paths:
        try:
            with path.open("rb") as file:
                start = file.read(len(_MAGIC))
        except OSError as err:
            return f"{path.name} cannot be read: {err.strerror}"
        if start != _MAGIC:
            return f"{path.name} is not a GGUF file (it begins with {start!r})" if start else f"{path.name} is empty"
    return None


def why_wrong_size(files: Mapping[Path, int]) -> str | None:
    """files: path -> the size it should have."""
    for path, size in files.items():
        try:
            actual = path.stat().st_size
        except OSError as err:
            return f"{path.name} cannot be read: {err.strerror}"
        if actual != size:
            return f"{path.name} is damaged: it has {actual} bytes and should have {size}"
    return None


def size_of(paths: Collection[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def is_below(path: Path, roots: Collection[Path]) -> bool:
    """The real place of path, links resolved, is inside one of roots."""
    real = path.resolve()
    return any(real.is_relative_to(root.resolve()) for root in roots)


def _projector_beside(
    folder: Path, model: names.Gguf, models: Collection[names.Gguf], projectors: Collection[str]
) -> Path | None:
    """A projector in the same folder belongs to the folder's only model, or to the one whose name is in its name."""
    if not projectors:
        return None
    bases = {_base(m) for m in models}
    mine = projectors if len(bases) == 1 else [p for p in projectors if _base(model) and _base(model) in p.lower()]
    name = names.pick_projector(mine)
    return folder / name if name else None


def _base(model: names.Gguf) -> str:
    """Of "gemma-3-4b-it-Q4_K_M" what its projector shares: "gemma-3-4b-it"."""
    stem = model.stem.lower()
    if model.quant and stem.endswith(model.quant.lower()):
        stem = stem[: -len(model.quant)]
    return stem.rstrip("-._")
