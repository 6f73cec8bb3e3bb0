"""What the Hub says of a repository, and its files' bytes. Blocking; called in a thread.

One metadata call tells everything that a download needs (commit, sizes, hashes, whether it is gated), so that what
cannot work is refused before a byte is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from helexa import __version__
from helexa.core.errors import HelexaError, LoadFailed, ModelNotFound, PermissionDenied
from helexa.neuron.store import http
from helexa.neuron.store.cache import HubFile
from helexa.neuron.store.disk import NOT_JSON

DEFAULT_ENDPOINT: Final = "https://huggingface.co"
_METADATA_LIMIT: Final = 32 << 20
_BUSY: Final = frozenset({408, 429, 500, 502, 503, 504})
_ATTEMPTS: Final = 4
_MAX_DELAY_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]

    def file(self, name: str) -> HubFile:
        return next(f for f in self.files if f.name == name)

    @property
    def names(self) -> list[str]:
        return [f.name for f in self.files]


class HubUnreachable(LoadFailed):
    """No connection to the Hub, or it is down. What is on disk can still be used."""


class _Lfs(msgspec.Struct):
    sha256: str | None = None
    size: int | None = None


class _Sibling(msgspec.Struct):
    rfilename: str
    size: int | None = None
    blobId: str | None = None  # the Hub's spelling
    lfs: _Lfs | None = None


class _ModelInfo(msgspec.Struct):
    sha: str
    siblings: list[_Sibling] = []
    gated: bool | str = False  # False, "auto" or "manual"


class Hub:
    """The Hub at HF_ENDPOINT. backoff_s is the first pause after a failure; it doubles."""

    def __init__(self, endpoint: str, token: str | None, *, backoff_s: float = 0.5) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._token = token
        self.backoff_s = backoff_s

    def listing(self, repo: str, cancel: http.Cancel) -> Listing:
        """The preflight. Raises ModelNotFound, PermissionDenied, or HubUnreachable at once where there is no network;
        a busy Hub is asked again some times."""
        url = f"{self.endpoint}/api/models/{repo}/revision/main?blobs=true"
        for attempt in range(_ATTEMPTS):
            try:
                with http.get(url, self._headers(), cancel) as response:
                    if response.status not in _BUSY:
                        return self._read_listing(repo, response)
                    problem = f"it answers {response.status}"
                    delay = retry_delay(attempt, self.backoff_s, response.headers.get("Retry-After"))
            except http.Unreachable as err:
                raise self._unreachable(str(err)) from err
            except http.Broken as err:
                problem, delay = str(err), retry_delay(attempt, self.backoff_s, None)
            if attempt < _ATTEMPTS - 1:
                cancel.wait(delay)
        raise self._unreachable(problem)

    def open(self, listing: Listing, file: HubFile, start: int, end: int, cancel: http.Cancel) -> http.Response:
        """The bytes [start, end) of a file, or all of it where the server knows no ranges (status 200)."""
        url = f"{self.endpoint}/{listing.repo}/resolve/{listing.commit}/{quote(file.name)}"
        return http.get(url, {**self._headers(), "Range": f"bytes={start}-{end - 1}"}, cancel)

    def refused(self, repo: str, status: int, headers: Message) -> HelexaError | None:
        """The error that a status means, None where trying again is right or it is none."""
        reason = headers.get("X-Error-Code", "")
        page = f"{self.endpoint}/{repo}"
        if reason == "GatedRepo" or (status == 403 and reason != "RepoNotFound"):
            return self._gated(repo)
        if status == 401 and self._token and reason != "RepoNotFound":
            return PermissionDenied(f"{self.endpoint} does not accept this HF_TOKEN: make a new one, or unset it")
        if status in (401, 404) and reason in ("EntryNotFound", "RevisionNotFound"):
            return ModelNotFound(f"a file of {repo} is no longer at {page}; try again")
        if status in (401, 404):
            private = "" if self._token else ", or is private (then set HF_TOKEN for neuron)"
            return ModelNotFound(f"there is no repository {repo} at {self.endpoint}{private}; check the name")
        if status >= 400 and status not in _BUSY:
            return LoadFailed(f"{self.endpoint} answers {status} for {repo}")
        return None

    def _read_listing(self, repo: str, response: http.Response) -> Listing:
        if error := self.refused(repo, response.status, response.headers):
            raise error
        try:
            info = msgspec.json.decode(response.read(_METADATA_LIMIT), type=_ModelInfo)
        except NOT_JSON as err:
            raise LoadFailed(f"{self.endpoint} does not answer as the Hub does for {repo}: {err}") from err
        if info.gated and not self._token:
            raise self._gated(repo)
        return Listing(repo, _safe(info.sha, repo), tuple(_file(s) for s in info.siblings if _is_safe(s.rfilename)))

    def _gated(self, repo: str) -> PermissionDenied:
        page = f"{self.endpoint}/{repo}"
        if self._token:
            return PermissionDenied(f"{repo} is gated and this HF_TOKEN has no access: ask for it at {page}")
        return PermissionDenied(f"{repo} is gated: accept its terms at {page}, then set HF_TOKEN for neuron")

    def _headers(self) -> dict[str, str]:
        headers = {"User-Agent": f"helexa/{__version__}", "Accept-Encoding": "identity"}
        return headers | {"Authorization": f"Bearer {self._token}"} if self._token else headers

    def _unreachable(self, problem: str) -> HubUnreachable:
        return HubUnreachable(f"the Hub cannot be reached ({problem}); check the network, or HF_ENDPOINT")


def from_environment(env: Mapping[str, str], *, backoff_s: float = 0.5) -> Hub:
    return Hub(env.get("HF_ENDPOINT") or DEFAULT_ENDPOINT, find_token(env), backoff_s=backoff_s)


def is_offline(env: Mapping[str, str]) -> str | None:
    """The variable that forbids the network, as huggingface_hub reads them."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if env.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return name
    return None


def find_token(env: Mapping[str, str]) -> str | None:
    """HF_TOKEN, else the file that `hf auth login` writes."""
    if token := env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN"):
        return token.strip()
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    try:
        return Path(env.get("HF_TOKEN_PATH") or os.path.join(home, "token")).expanduser().read_text().strip() or None
    except (OSError, RuntimeError):
        return None


def retry_delay(attempt: int, first_s: float, retry_after: str | None) -> float:
    """Doubling, at most half a minute; the server's own wish where it gives one in seconds."""
    if retry_after and retry_after.isdigit():
        return min(float(retry_after), _MAX_DELAY_S)
    return min(first_s * float(1 << attempt), _MAX_DELAY_S)


def _file(sibling: _Sibling) -> HubFile:
    lfs = sibling.lfs or _Lfs()
    size = lfs.size if lfs.size is not None else sibling.size
    return HubFile(sibling.rfilename, size or 0, _hash(sibling.blobId), _hash(lfs.sha256))


def _hash(value: str | None) -> str | None:
    return value if value and value.isalnum() else None


def _is_safe(name: str) -> bool:
    """It becomes a path below the snapshot: no server may lead out of it."""
    return not name.startswith("/") and "\\" not in name and "\0" not in name and ".." not in name.split("/")


def _safe(commit: str, repo: str) -> str:
    if not commit.isalnum():
        raise LoadFailed(f"the Hub names no commit for {repo} ({commit!r})")
    return commit
