"""What lies on this disk and which of it a name means. Reads only; no network."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from helexa.core.errors import BadRequest, ModelNotFound, NeverLoads
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.store import disk, names
from helexa.neuron.store.cache import HubCache
from helexa.neuron.store.disk import GGUF, OF_HARNESS, SAFETENSORS, StoredModel
from helexa.neuron.store.names import HubRef


@dataclass(slots=True)
class _Scan:
    """The models on disk, and by what it is seen that they changed."""

    models: list[StoredModel] = field(default_factory=list)
    folders: dict[Path, int | None] = field(default_factory=dict)
    sizes: dict[Path, int] = field(default_factory=dict)

    def is_fresh(self) -> bool:
        # A file that is still being copied here changes its size, and its folder nothing.
        return all(_mtime(f) == at for f, at in self.folders.items()) and all(
            _size(f) == size for f, size in self.sizes.items()
        )


class Shelf:
    """models_dir and the Hugging Face cache, looked through with the eyes of this node's harnesses (formats)."""

    def __init__(
        self, models_dir: Path | None, cache: HubCache | None, formats: Collection[str], gguf_owners: Sequence[str]
    ) -> None:
        self.models_dir = models_dir
        self.cache = cache
        self.formats = formats
        self._owners = gguf_owners
        self._scan: _Scan | None = None

    def models(self) -> list[StoredModel]:
        """Every model that can be named, incomplete and damaged ones with their `error`. Some stat calls when nothing
        changed since the last time; folders are read again where one did."""
        if self._scan is None or not self._scan.is_fresh():
            self._scan = self._read_disk()
        return self._scan.models

    def forget(self) -> None:
        """Read anew the next time."""
        self._scan = None

    def lookup(self, request: LoadRequest) -> StoredModel | None:
        """1. source as a path  2. source as a reference  3. id below models_dir  4. id in the cache."""
        if request.source is not None:
            path = self.path_of(request.source)
            if path is not None:
                return self._at_path(path, request)
            return self.cached(self.ref_of(request, request.source))
        if not request.id:
            raise BadRequest("a load request needs model_id or source", param="model_id")
        found = self._below_models_dir(request.id, request)
        wanted = names.parse_ref(request.id)
        if found is None and wanted is not None:
            found = self._below_models_dir(wanted.repo, request, wanted.tag)
        if found is None and wanted is not None:
            found = self.cached(self.ref_of(request, request.id))
        return found

    def path_of(self, source: str) -> Path | None:
        """The path that a source means, None for a reference to the Hub."""
        if "\0" in source:
            raise BadRequest("source has a NUL byte in it", param="source")
        below = self.models_dir / source if self.models_dir else None
        if below is not None and below.exists():
            return below
        if not names.is_path(source):
            return None
        path = Path(source).expanduser() if source.startswith("~") else Path(source)
        return below if below is not None and not path.is_absolute() else path

    def ref_of(self, request: LoadRequest, text: str) -> HubRef:
        wanted = names.parse_ref(text)
        if wanted is None:
            raise BadRequest(
                f"source {text!r} is neither a file nor a folder here, nor a Hub reference like owner/repo:Q4_K_M",
                param="source",
            )
        if request.quant and wanted.tag and request.quant.lower() != wanted.tag.lower():
            raise BadRequest(f"quant {request.quant!r} and {text!r} contradict each other", param="quant")
        return HubRef(wanted.repo, request.quant or wanted.tag, _only(request))

    def candidates(self, ref: HubRef) -> list[str]:
        """The repository, and where a quant is wanted (or only GGUF can be served) those with its GGUF files."""
        formats = self.formats_for(ref)
        wants_gguf = GGUF in formats and (ref.tag is not None or SAFETENSORS not in formats)
        return [ref.repo, *(names.gguf_repos(ref.repo, self._owners) if wants_gguf else [])]

    def formats_for(self, ref: HubRef) -> Collection[str]:
        return self.formats if ref.only is None else (ref.only,)

    def cached(self, ref: HubRef) -> StoredModel | None:
        if self.cache is None:
            return None
        for repo in self.candidates(ref):
            found = _choose(self.cache.read(repo).models(self.formats_for(ref)), ref.tag)
            if found is not None:
                return found
        return None

    def not_found(self, name: str) -> ModelNotFound:
        near = difflib.get_close_matches(name, [m.id for m in self.models()], n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "it is not below models_dir nor in the download cache"
        return ModelNotFound(f"{name} is not on this node's disk; {hint}")

    def _read_disk(self) -> _Scan:
        scan = _Scan()
        if self.models_dir is not None:
            scan.folders[self.models_dir] = _mtime(self.models_dir)
            for folder, files in disk.walk(self.models_dir):
                scan.folders[folder] = _mtime(folder)
                scan.models += disk.in_folder(self.models_dir, folder, files, self.formats)
        if self.cache is not None:
            scan.folders |= {f: _mtime(f) for f in self.cache.watched()}
            for repo in self.cache.repos():
                scan.models += self.cache.read(repo).models(self.formats)
        scan.sizes = {f: _size(f) for model in scan.models for f in model.files}
        return scan

    def _at_path(self, path: Path, request: LoadRequest) -> StoredModel:
        quant, only = request.quant, _only(request)
        folder = path if path.is_dir() else path.parent
        if not path.exists():
            raise NeverLoads(f"{path} is not there (or this user may not see it)")
        root = self.models_dir if self.models_dir and folder.is_relative_to(self.models_dir) else folder
        models = disk.in_folder(root, folder, sorted(os.listdir(folder)), (only,) if only else (GGUF, SAFETENSORS))
        if not path.is_dir():
            for model in models:
                if path in model.files:
                    return model
            raise NeverLoads(f"{path} is not a model file (.gguf)")
        chosen = _choose(models, quant)
        if chosen is None and models:
            there = ", ".join(sorted(m.quant or m.stem or "safetensors" for m in models))
            raise NeverLoads(f"{path} has no {quant}; it has {there}")
        if chosen is None:
            raise NeverLoads(f"{path} holds no model: neither a .gguf file nor config.json with .safetensors files")
        return chosen

    def _below_models_dir(self, name: str, request: LoadRequest, tag: str | None = None) -> StoredModel | None:
        wanted = name.removesuffix(".gguf").strip("/")
        quant, only = request.quant or tag, _only(request)
        here = [m for m in self.models() if m.repo is None and only in (None, GGUF if m.stem else SAFETENSORS)]
        for model in here:
            if model.id == wanted and (quant is None or model.quant in (None, quant.upper())):
                return model
        return _choose([m for m in here if m.stem and m.id.rpartition("/")[0] == wanted], quant)


def _choose(models: Sequence[StoredModel], tag: str | None) -> StoredModel | None:
    """Of what lies together the one that the tag means; without a tag GGUF by preference, else the model folder."""
    by_stem = {m.stem: m for m in models if m.stem}
    picked = names.pick([names.Gguf(stem, (), (1,) if m.error else ()) for stem, m in by_stem.items()], tag)
    if picked is not None:
        return by_stem[picked[1].stem]
    return next((m for m in models if not m.stem), None) if HubRef("", tag).weights else None


def _only(request: LoadRequest) -> str | None:
    """The format that the harness which is named reads."""
    return OF_HARNESS.get(request.harness or "")


def _mtime(folder: Path) -> int | None:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1
