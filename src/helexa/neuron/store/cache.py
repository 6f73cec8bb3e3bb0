"""The Hugging Face cache on disk, in the layout that huggingface_hub gives it, so that every tool shares one copy.

    models--owner--repo/blobs/<sha256, or git's sha1 for small files>      refs/main -> a commit
    models--owner--repo/snapshots/<commit>/<file> -> ../../blobs/<hash>    trees/<commit>.json: sizes and hashes
    .locks/models--owner--repo/<hash>.lock                                 taken with flock while a blob is written

A blob is written as <hash>.incomplete and renamed when its hash was verified: what has its final name is whole, unless
the disk lost it later.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from helexa.neuron.store import names
from helexa.neuron.store.disk import (
    GGUF,
    NOT_JSON,
    SAFETENSORS,
    StoredModel,
    size_of,
    weight_files,
    why_not_gguf,
    why_wrong_size,
)

_PREFIX: Final = "models--"
_TREE_FORMAT: Final = 1  # huggingface_hub's `_tree_cache.py`


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository as the Hub describes it. blob is its name in the cache."""

    name: str
    size: int
    git_sha1: str | None = None
    sha256: str | None = None  # of files in LFS or Xet storage: all large ones

    @property
    def blob(self) -> str:
        return self.sha256 or self.git_sha1 or ""


@dataclass(slots=True)
class CachedRepo:
    """A repository's files that are on disk, the newest snapshot first."""

    repo: str
    folder: Path
    snapshots: dict[Path, list[str]] = field(default_factory=dict)  # snapshot -> relative names of files that exist

    def models(self, formats: Collection[str]) -> list[StoredModel]:
        found: dict[str, StoredModel] = {}
        for snapshot, files in self.snapshots.items():
            sizes = self.sizes(snapshot)
            for model in self._of_snapshot(snapshot, files, sizes, formats):
                best = found.get(model.id)
                if best is None or (best.error and not model.error):
                    found[model.id] = model
        return list(found.values())

    def _of_snapshot(
        self, snapshot: Path, files: list[str], sizes: Mapping[str, int], formats: Collection[str]
    ) -> Iterator[StoredModel]:
        projector = names.pick_projector(files)
        for tag, model in names.tags(names.group(files)).items() if GGUF in formats else ():
            paths = tuple(snapshot / p for p in model.parts)
            ref = str(names.HubRef(self.repo, tag))
            yield StoredModel(
                id=ref,
                files=paths,
                source=ref,
                quant=model.quant,
                size_bytes=size_of(paths),
                stem=model.stem,
                repo=self.repo,
                projector=snapshot / projector if projector else None,
                error=model.why_incomplete
                or why_wrong_size({snapshot / p: sizes[p] for p in model.parts if p in sizes})
                or why_not_gguf(paths),
            )
        if SAFETENSORS in formats and "config.json" in files and (weights := weight_files(files)):
            paths = tuple(snapshot / w for w in weights)
            missing = sorted(set(weight_files(list(sizes))) - set(files)) if sizes else []
            yield StoredModel(
                id=self.repo,
                files=paths,
                source=self.repo,
                quant=None,
                size_bytes=size_of(paths),
                repo=self.repo,
                error=f"{', '.join(missing)} of {self.repo} not downloaded"
                if missing
                else why_wrong_size({snapshot / w: sizes[w] for w in weights if w in sizes}),
            )

    def sizes(self, snapshot: Path) -> dict[str, int]:
        """Sizes that the files of a snapshot should have, where the tree was kept."""
        try:
            tree = msgspec.json.decode((self.folder / "trees" / f"{snapshot.name}.json").read_bytes(), type=_Tree)
        except (OSError, *NOT_JSON):
            return {}
        if tree.format_version != _TREE_FORMAT:
            return {}
        return {name: e.size if e.lfs_size is None else e.lfs_size for name, e in tree.files.items()}


class _TreeEntry(msgspec.Struct):
    size: int
    lfs_size: int | None = None


class _Tree(msgspec.Struct):
    format_version: int
    files: dict[str, _TreeEntry]


class HubCache:
    """The cache folder ("hub" below HF_HOME). Reading never creates anything."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def repo_folder(self, repo: str) -> Path:
        return self.root / (_PREFIX + repo.replace("/", "--"))

    def repos(self) -> Iterator[str]:
        try:
            entries = sorted(os.listdir(self.root))
        except OSError:
            return
        for entry in entries:
            owner, _, name = entry.removeprefix(_PREFIX).partition("--")
            if entry.startswith(_PREFIX) and owner and name:
                yield f"{owner}/{name}"

    def read(self, repo: str) -> CachedRepo:
        """What of the repository is on disk. A snapshot entry whose blob is gone does not count."""
        folder = self.repo_folder(repo)
        cached = CachedRepo(repo, folder)
        for snapshot in self._snapshots(folder):
            files = []
            for parent, _, present in os.walk(snapshot):
                at = Path(parent)
                files += [(at / f).relative_to(snapshot).as_posix() for f in present if (at / f).exists()]
            cached.snapshots[snapshot] = sorted(files)
        return cached

    def _snapshots(self, folder: Path) -> list[Path]:
        try:
            found = [s for s in (folder / "snapshots").iterdir() if s.is_dir()]
        except OSError:
            return []
        main = ""
        with suppress(OSError):
            main = (folder / "refs" / "main").read_text().strip()
        return sorted(found, key=lambda s: (s.name != main, -s.stat().st_mtime, s.name))

    def watched(self) -> Iterator[Path]:
        """The folders whose time of change tells that something was added or taken away."""
        yield self.root
        for repo in self.repos():
            folder = self.repo_folder(repo)
            yield folder / "snapshots"
            yield folder / "refs"
            for snapshot in self._snapshots(folder):
                for parent, _, _ in os.walk(snapshot):
                    yield Path(parent)

    # ---- writing

    def blob(self, repo: str, file: HubFile) -> Path:
        return self.repo_folder(repo) / "blobs" / file.blob

    def partial(self, repo: str, file: HubFile) -> Path:
        """huggingface_hub before 1.x wrote and resumed the same name."""
        return self.repo_folder(repo) / "blobs" / f"{file.blob}.incomplete"

    def has(self, repo: str, file: HubFile) -> bool:
        try:
            return self.blob(repo, file).stat().st_size == file.size
        except OSError:
            return False

    @contextmanager
    def lock(self, repo: str, file: HubFile, wait: Callable[[float], bool]) -> Iterator[None]:
        """One writer of a blob among all processes. `wait(seconds)` is called between tries; it may raise."""
        folder = self.root / ".locks" / self.repo_folder(repo).name
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / f"{file.blob}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while not try_flock(descriptor):
                wait(0.2)
            yield
        finally:
            os.close(descriptor)

    def link(self, repo: str, commit: str, file: HubFile) -> Path:
        """Put the blob into the snapshot; the path a tool opens."""
        blob = self.blob(repo, file)
        pointer = self.pointer(repo, commit, file.name)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        if pointer.is_symlink() and pointer.exists():
            return pointer
        temporary = pointer.with_name(f".{pointer.name}.{os.getpid()}.{time.monotonic_ns()}")
        try:
            temporary.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError as err:
            if err.errno not in (errno.EPERM, errno.ENOTSUP, errno.EINVAL):
                raise
            # No symbolic links here (exFAT, some network mounts): as huggingface_hub does, the file itself moves.
            os.replace(blob, pointer)
            return pointer
        os.replace(temporary, pointer)
        return pointer

    def pointer(self, repo: str, commit: str, name: str) -> Path:
        return self.repo_folder(repo) / "snapshots" / commit / name

    def keep_tree(self, repo: str, commit: str, files: Iterable[HubFile]) -> None:
        """Sizes and hashes of a commit, by which a damaged file is known later, also offline."""
        entries: dict[str, dict[str, Any]] = {}
        for file in files:
            entry: dict[str, Any] = {"size": file.size, "blob_id": file.git_sha1 or ""}
            if file.sha256:
                entry |= {"lfs_sha256": file.sha256, "lfs_size": file.size}
            entries[file.name] = entry
        tree = {"format_version": _TREE_FORMAT, "files": entries}
        target = self.repo_folder(repo) / "trees" / f"{commit}.json"
        if not target.exists():
            write_whole(target, msgspec.json.encode(tree))

    def keep_ref(self, repo: str, revision: str, commit: str) -> None:
        target = self.repo_folder(repo) / "refs" / revision
        with suppress(OSError):
            if target.read_text() == commit:
                return
        write_whole(target, commit.encode())

    # ---- removing

    def remove(self, repo: str, file_names: Collection[str]) -> list[Path]:
        """Take these files out of every snapshot, and their blobs where nothing else points to them."""
        gone: list[Path] = []
        blobs: set[Path] = set()
        folder = self.repo_folder(repo)
        for snapshot in self._snapshots(folder):
            for name in file_names:
                pointer = snapshot / name
                if not os.path.lexists(pointer):
                    continue
                if pointer.is_symlink():
                    blobs.add(pointer.parent / os.readlink(pointer))
                pointer.unlink()
                gone.append(pointer)
        wanted = {Path(os.path.normpath(b)) for b in blobs} - set(self._pointed_to(folder))
        for blob in sorted(wanted):
            if os.path.lexists(blob) and blob.parent == folder / "blobs":
                gone += self._remove_blob(blob)
        if not any(self.read(repo).snapshots.values()) and not self.is_busy(repo):
            gone += self.remove_repo(repo)
        return gone

    def remove_repo(self, repo: str) -> list[Path]:
        """The whole folder, with what is left of interrupted downloads."""
        folder = self.repo_folder(repo)
        if not folder.is_dir():
            return []
        gone = []
        for blob in sorted((folder / "blobs").glob("*")):
            gone += self._remove_blob(blob)
        shutil.rmtree(folder)
        shutil.rmtree(self.root / ".locks" / folder.name, ignore_errors=True)
        return [*gone, folder]

    def is_busy(self, repo: str) -> bool:
        """Some process is writing one of its blobs."""
        for lock in (self.root / ".locks" / self.repo_folder(repo).name).glob("*.lock"):
            with lock.open("rb") as file:
                if not try_flock(file.fileno()):
                    return True
        return False

    def _pointed_to(self, folder: Path) -> Iterator[Path]:
        for parent, _, files in os.walk(folder / "snapshots"):
            for name in files:
                pointer = Path(parent) / name
                if pointer.is_symlink():
                    yield Path(os.path.normpath(pointer.parent / os.readlink(pointer)))

    def _remove_blob(self, blob: Path) -> list[Path]:
        """A blob may itself be a link into the store that huggingface_hub 2.x shares between repositories."""
        shared = Path(os.path.normpath(blob.parent / os.readlink(blob))) if blob.is_symlink() else None
        blob.unlink()
        if shared is None or not shared.is_relative_to(self.root / "blobs"):
            return [blob]
        for repo in self.repos():
            for other in (self.repo_folder(repo) / "blobs").glob("*"):
                if other.is_symlink() and Path(os.path.normpath(other.parent / os.readlink(other))) == shared:
                    return [blob]
        shared.unlink(missing_ok=True)
        shared.with_name(f"{shared.name}.refs").unlink(missing_ok=True)
        return [blob, shared]


def try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_whole(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{time.monotonic_ns()}")
    temporary.write_bytes(data)
    os.replace(temporary, target)


def cache_root(hf_home: Path | None, env: Mapping[str, str], fallback: Path | None) -> Path | None:
    """Where huggingface_hub would look; `fallback` for a service without a home. None: nowhere."""
    if hf_home is not None:
        return hf_home / "hub"
    if env.get("HF_HUB_CACHE"):
        return Path(env["HF_HUB_CACHE"]).expanduser()
    if env.get("HF_HOME"):
        return Path(env["HF_HOME"]).expanduser() / "hub"
    if env.get("XDG_CACHE_HOME"):
        return Path(env["XDG_CACHE_HOME"]) / "huggingface" / "hub"
    try:
        return Path("~/.cache/huggingface/hub").expanduser()
    except RuntimeError:  # neither HOME nor an entry in passwd
        return fallback / ".cache" / "huggingface" / "hub" if fallback else None
