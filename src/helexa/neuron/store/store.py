"""The node's store: what a load request means on this disk, and fetching what is not there.

A name is looked up in models_dir, then in the Hugging Face cache, then on the Hub. The disk comes first, so that a
node whose network is down serves what it has. The coroutines belong to one loop and read disks and sockets in threads;
the plain methods read the disk themselves.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helexa.core.errors import BadRequest, Conflict, ModelNotFound, NeverLoads, PermissionDenied
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import ModelFiles
from helexa.neuron.store import disk, hub, names
from helexa.neuron.store.cache import CachedRepo, HubCache, cache_root
from helexa.neuron.store.disk import GGUF, SAFETENSORS, StoredModel
from helexa.neuron.store.fetch import Fetcher, Report
from helexa.neuron.store.names import HubRef
from helexa.neuron.store.shelf import Shelf

NOT_WHOLE: Final = "file_not_whole"
# Files of a safetensors repository that an engine needs beside the weights.
_BESIDE_WEIGHTS: Final = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_BESIDE_FOLDERS: Final = ("1_Pooling/", "additional_chat_templates/")


@dataclass(frozen=True, slots=True)
class Pulled:
    """What `pull` did. note: why nothing was fetched although the Hub was asked for."""

    files: ModelFiles
    fetched: bool
    note: str | None = None


class Store:
    """formats: what the harnesses of this node serve; a repository that has none of them is never downloaded.

    hf_home is for tests; left out, HF_HUB_CACHE, HF_HOME and their kin are followed. backoff_s is the first pause
    after a failed request to the Hub.
    """

    def __init__(
        self,
        *,
        models_dir: Path | None,
        allowed_roots: Sequence[Path],
        allow_downloads: bool,
        gguf_owners: Sequence[str],
        hf_home: Path | None = None,
        formats: Collection[str] = (GGUF,),
        backoff_s: float = 0.5,
    ) -> None:
        models_dir = _absolute(models_dir) if models_dir else None
        self._models_dir = models_dir
        self._roots = [*([models_dir] if models_dir else []), *map(_absolute, allowed_roots)]
        self._allow_downloads = allow_downloads
        self._formats = formats
        self._backoff_s = backoff_s
        root = cache_root(hf_home, os.environ, models_dir)
        self._cache = HubCache(root) if root else None
        self._fetcher = Fetcher(self._cache) if self._cache else None
        self._shelf = Shelf(models_dir, self._cache, formats, gguf_owners)

    # ---- what is here

    def on_disk(self) -> list[StoredModel]:
        """Every model that can be named, incomplete and damaged ones with their `error`. Cached; read again when a
        folder or a size changed. May block some milliseconds."""
        return self._shelf.models()

    # ---- finding

    def find_local(self, request: LoadRequest) -> ModelFiles | None:
        """The model where it is on this disk, None where `resolve` would have to ask the Hub: it is not here, or the
        cached copy is damaged, or a draft or adapter of it is. No network.

        Raises NeverLoads for a path that is absent, incomplete or damaged, BadRequest for a contradiction.
        """
        found = self._shelf.lookup(request)
        if found is None or (found.error and found.repo) or self._missing_beside(request):
            return None
        if found.error:
            raise NeverLoads(self._broken_message(found), code=NOT_WHOLE)
        return self._as_files(request, found)

    async def resolve(self, request: LoadRequest, progress: Report) -> ModelFiles:
        """The model on disk, fetched from the Hub first where that is allowed.

        progress is called on this loop, a few times a second while something comes. Cancelling is safe: what came is
        kept and the next call goes on from there; a fetch that another call waits for goes on. Raises HelexaError.
        """
        found = await asyncio.to_thread(self._shelf.lookup, request)
        if found is None or (found.error and found.repo):
            found = await self._fetch(request, found, progress)
        if found.error:
            raise NeverLoads(self._broken_message(found), code=NOT_WHOLE)
        for beside, damaged in await asyncio.to_thread(self._missing_beside, request):
            await self._fetch(beside, damaged, progress)
        return await asyncio.to_thread(self._as_files, request, found)

    async def pull(self, ref: str, progress: Report) -> Pulled:
        """Fetch, or bring up to date, `owner/repo` or `owner/repo:QUANT`. Where the Hub cannot be reached, what is on
        disk is the answer, and the note says so."""
        request = LoadRequest(source=ref)
        wanted = names.parse_ref(ref)
        if wanted is None:
            raise BadRequest(f"{ref!r} is not a reference to the Hub: owner/repo or owner/repo:QUANT", param="source")
        before = await asyncio.to_thread(self._shelf.cached, wanted)
        intact = before if before and not before.error else None
        try:
            found = await self._fetch(request, before, progress)
        except hub.HubUnreachable as err:
            if intact is None:
                raise
            return Pulled(self._as_files(request, intact), fetched=False, note=f"{err.message}; it is on disk already")
        same = intact is not None and [p.resolve() for p in intact.files] == [p.resolve() for p in found.files]
        return Pulled(self._as_files(request, found), fetched=not same, note="up to date" if same else None)

    def check_source_allowed(self, source: str, *, local_caller: bool) -> None:
        """A caller from elsewhere may name paths only below models_dir and allowed_roots, links resolved."""
        if local_caller:
            return
        candidate = Path(source)
        relative = self._models_dir / source if self._models_dir else None
        if names.is_path(source) or candidate.is_absolute():
            real = candidate if candidate.is_absolute() else relative
        elif relative is not None and relative.exists():
            real = relative
        else:
            real = None  # a reference to the Hub; `resolve` says what else it could have been
        clean = "\0" not in source and not source.startswith("~") and ".." not in source.split("/")
        if (
            not clean
            or (real is not None and not disk.is_below(real, self._roots))
            or (real is None and names.is_path(source))
        ):
            roots = ", ".join(map(str, self._roots)) or "none are set"
            raise PermissionDenied(
                f"source {source!r} is outside the folders that a remote caller may name ({roots}): put the file below "
                "models_dir, or add its folder to allowed_roots in neuron.toml",
                param="source",
            )

    def check_request_allowed(self, request: LoadRequest, *, local_caller: bool) -> None:
        """`check_source_allowed` for every field that may name a file."""
        for source in (request.source, request.draft, request.projector, *(request.lora or ())):
            if source is not None:
                self.check_source_allowed(source, local_caller=local_caller)

    # ---- removing

    def remove(self, ref: str, *, in_use: Collection[Path]) -> list[Path]:
        """Delete a model by its id (or a repository that holds but one): all parts, and what only it needed.

        in_use: files of loaded models. Returns the paths that are gone. ModelNotFound; Conflict (model_in_use) where
        it is loaded; BadRequest where the name means several.
        """
        models = self._removable(ref)
        used = {p.resolve() for p in in_use}
        for model in models:
            if any(f.resolve() in used for f in model.files):
                raise Conflict(f"{model.id} is loaded: unload it first", code="model_in_use")
        gone: list[Path] = []
        for model in models:
            gone += self._remove_cached(model) if model.repo else self._remove_files(model)
        if not models and (wanted := names.parse_ref(ref)) and self._cache:
            gone = self._cache.remove_repo(wanted.repo)  # nothing but an interrupted download
        self._shelf.forget()
        return gone

    def _removable(self, ref: str) -> list[StoredModel]:
        models = self.on_disk()
        exact = [m for m in models if m.id.lower() in (ref.lower(), ref.lower().removesuffix(".gguf"))]
        if exact:
            return exact[:1]
        wanted = names.parse_ref(ref)
        if wanted is not None:
            of_repo = [m for m in models if m.repo and m.repo.lower() == wanted.repo.lower()]
            if wanted.tag is not None:
                of_repo = [
                    m for m in of_repo if _tag_of(m).lower() == wanted.tag.lower() or m.quant == wanted.tag.upper()
                ]
            if len(of_repo) == 1:
                return of_repo
            if len(of_repo) > 1:
                raise BadRequest(f"{ref} is on disk as {', '.join(m.id for m in of_repo)}: name one of them")
            if self._cache and wanted.tag is None and self._cache.repo_folder(wanted.repo).is_dir():
                if self._cache.is_busy(wanted.repo):
                    raise Conflict(f"{wanted.repo} is being downloaded", code="model_in_use")
                return []
        raise self._shelf.not_found(ref)

    def _remove_cached(self, model: StoredModel) -> list[Path]:
        assert model.repo is not None
        assert self._cache is not None
        cached = self._cache.read(model.repo)
        snapshot = _snapshot_of(model, cached)
        removed = [f.relative_to(snapshot).as_posix() for f in model.files]
        others = [m for m in cached.models((GGUF, SAFETENSORS)) if m.id != model.id]
        if not any(bool(m.stem) == bool(model.stem) for m in others):
            # What served this model alone. Other files another tool fetched for itself.
            needed = names.is_projector if model.stem else _is_beside_weights
            removed += [f for files in cached.snapshots.values() for f in files if needed(f) and f not in removed]
        return self._cache.remove(model.repo, removed)

    def _remove_files(self, model: StoredModel) -> list[Path]:
        folder = model.files[0].parent
        wanted = list(model.files)
        others = [m for m in self.on_disk() if m.id != model.id]
        if model.projector is not None and all(m.projector != model.projector for m in others):
            wanted.append(model.projector)
        if not model.stem:
            wanted += [f for f in sorted(folder.iterdir()) if f.is_file() and _is_beside_weights(f.name)]
        for file in wanted:
            file.unlink(missing_ok=True)
        while folder != self._models_dir and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
        return wanted

    # ---- fetching

    async def _fetch(self, request: LoadRequest, damaged: StoredModel | None, progress: Report) -> StoredModel:
        text = request.source or request.id
        if names.parse_ref(text) is None:
            raise self._shelf.not_found(text)
        ref = self._shelf.ref_of(request, text)
        broken = damaged is not None and damaged.error is not None
        what = self._broken_message(damaged) if damaged and damaged.error else f"{ref} is not on this node's disk"
        if not self._allow_downloads:
            raise PermissionDenied(
                f"{what}, and allow_downloads = false in neuron.toml: set it to true, or put the files below models_dir"
            )
        if variable := hub.is_offline(os.environ):
            raise PermissionDenied(f"{what}, and {variable} is set: unset it, or put the files below models_dir")
        if self._cache is None or self._fetcher is None:
            raise PermissionDenied(f"{what}, and there is no home directory to download to: set HF_HOME")
        client = hub.from_environment(os.environ, backoff_s=self._backoff_s)
        try:
            listing, wanted = await self._fetcher.find(client, ref, self._shelf.candidates(ref), self._files_wanted)
        except hub.HubUnreachable as err:
            raise hub.HubUnreachable(f"{what}, and {err.message}", retry_after_s=30) from err
        paths = await self._fetcher.fetch(client, listing, wanted, progress, distrust=broken)
        self._shelf.forget()
        models = await asyncio.to_thread(lambda: self._cache_of().read(listing.repo).models(self._formats))
        found = next((m for m in models if paths[0] in m.files), None)
        if found is None or found.error:
            raise NeverLoads(
                f"{listing.repo} was downloaded, but: {found.error if found else 'it is no model'}", code=NOT_WHOLE
            )
        return found

    def _cache_of(self) -> HubCache:
        assert self._cache is not None
        return self._cache

    def _files_wanted(self, ref: HubRef, listing: hub.Listing) -> list[str] | None:
        """The files of a repository that make the model, the first part first; None: look in the next repository.
        Raises ModelNotFound, naming the quants there are."""
        models = names.group(listing.names)
        formats = [f for f in self._shelf.formats_for(ref) if f in self._formats]
        if models and GGUF in formats:
            picked = names.pick(models, ref.tag)
            if picked is None:
                there = ", ".join(names.tags(models))
                raise ModelNotFound(f"{listing.repo} has no {ref.tag}; it has {there}", param="quant")
            if picked[1].why_incomplete:
                raise NeverLoads(f"{listing.repo} is incomplete on the Hub: {picked[1].why_incomplete}")
            projector = names.pick_projector(listing.names)
            return [*picked[1].parts, *([projector] if projector else [])]
        if ref.weights and SAFETENSORS in formats:
            weights = disk.weight_files(listing.names)
            beside = [n for n in listing.names if _is_beside_weights(n)]
            if weights and "config.json" in beside:
                return [*weights, *beside]
        return None

    def _missing_beside(self, request: LoadRequest) -> list[tuple[LoadRequest, StoredModel | None]]:
        """Draft, projector and adapters that are named by Hub references and not (or damaged) on disk."""
        missing = []
        for source in (request.draft, request.projector, *(request.lora or ())):
            if source is not None and self._shelf.path_of(source) is None and names.parse_ref(source):
                beside = LoadRequest(source=source)
                found = self._shelf.lookup(beside)
                if found is None or found.error:
                    missing.append((beside, found))
        return missing

    # ---- answers

    def _as_files(self, request: LoadRequest, found: StoredModel) -> ModelFiles:
        return ModelFiles(
            model_id=request.id or found.id,
            files=found.files,
            projector=self._projector(request, found),
            draft=self._beside("draft", request.draft) if request.draft else None,
            lora=tuple(self._beside("lora", text) for text in request.lora or ()),
        )

    def _projector(self, request: LoadRequest, found: StoredModel) -> Path | None:
        if request.projector is None:
            return found.projector
        path = self._shelf.path_of(request.projector)
        if path is None:
            other = self._shelf.lookup(LoadRequest(source=request.projector))
            if other is None or other.projector is None:
                raise NeverLoads(f"projector {request.projector}: no mmproj file there")
            return other.projector
        if not path.is_absolute() or not path.is_file():
            path = found.files[0].parent / request.projector
        if not path.is_file():
            raise NeverLoads(f"projector {request.projector} is not there")
        return path

    def _beside(self, what: str, source: str) -> Path:
        path = self._shelf.path_of(source)
        if path is not None and path.is_file():
            return path
        found = self._shelf.lookup(LoadRequest(source=source))
        if found is None or found.error:
            raise NeverLoads(f"{what} {source}: {found.error if found else 'not on this disk'}")
        return found.files[0]

    def _broken_message(self, model: StoredModel) -> str:
        again = f"; `neuron pull {model.id}` fetches it again" if model.repo else ""
        return f"{model.id} cannot be served: {model.error}{again}"


def _is_beside_weights(name: str) -> bool:
    return name.endswith(_BESIDE_WEIGHTS) and ("/" not in name or name.startswith(_BESIDE_FOLDERS))


def _absolute(path: Path) -> Path:
    """Links are kept: a model's path is shown as the operator knows it."""
    return Path(os.path.abspath(path.expanduser()))


def _tag_of(model: StoredModel) -> str:
    return model.id.partition(":")[2]


def _snapshot_of(model: StoredModel, cached: CachedRepo) -> Path:
    return next(s for s in cached.snapshots if model.files[0].is_relative_to(s))
