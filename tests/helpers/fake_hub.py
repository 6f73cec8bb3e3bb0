"""A small Hub: the parts of huggingface.co's API that a download uses, and its faults on command.

    GET  /api/models/{repo}/revision/{rev}?blobs=true    commit, files, sizes, hashes; 401/404 as the Hub gives them
    GET  /api/models/{repo}/tree/{rev}                   the same as a list, which huggingface_hub asks for
    GET  /{repo}/resolve/{rev}/{file}                    small files themselves, large ones by a redirect to the "CDN":
    GET  /cdn/{sha256}                                   a second server on another port; ranges, and no Authorization

Large are .gguf and .safetensors. A fault is taken once, by the next GET of that file's bytes (or of the API).
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

API = "api"  # the name under which faults of the API itself are queued


@dataclass(frozen=True)
class Status:
    """Answer this instead."""

    code: int
    retry_after: str | None = None


@dataclass(frozen=True)
class BreakOff:
    """Send so many bytes of the body, then drop the connection."""

    after: int


@dataclass(frozen=True)
class Hold:
    """Send so many bytes, then nothing until `release` is called or the client goes."""

    after: int


@dataclass(frozen=True)
class Garble:
    """The right number of bytes, not the right ones."""


@dataclass(frozen=True)
class IgnoreRange:
    """Answer 200 with the whole file, whatever was asked for."""


Fault = Status | BreakOff | Hold | Garble | IgnoreRange


@dataclass
class Repo:
    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    announced: dict[str, int] = field(default_factory=dict)  # sizes that the API gives in place of the true ones

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted((n, sha256(d)) for n, d in self.files.items())).encode()).hexdigest()


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    server: str  # "hub" or "cdn"
    method: str
    path: str
    headers: dict[str, str]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class FakeHub:
    """Both servers. Use `running()`; `endpoint` is what HF_ENDPOINT takes."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.seen: list[Seen] = []
        self.token: str | None = None  # what opens gated and private repositories
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.holding = threading.Event()  # a Hold has been reached
        self._release = threading.Event()
        self._hub = self._server("hub")
        self._cdn = self._server("cdn")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._cdn.server_port}"

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> Repo:
        self.repos[name] = Repo(files, **options)
        return self.repos[name]

    def fail(self, what: str, *faults: Fault) -> None:
        """what: a file's name, or API."""
        self.faults[what].extend(faults)

    def release(self) -> None:
        self._release.set()

    def downloads(self, name: str) -> list[Seen]:
        """The GETs of a file's bytes, redirects not counted."""
        data = next(r.files[name] for r in self.repos.values() if name in r.files)
        tail = f"/cdn/{sha256(data)}" if is_large(name) else f"/{name}"
        return [s for s in self.seen if s.method == "GET" and s.path.endswith(tail) and "/api/" not in s.path]

    def _server(self, name: str) -> ThreadingHTTPServer:
        hub = self

        class Handler(_Handler):
            server_name = name
            fake = hub

        return _Server(("127.0.0.1", 0), Handler)

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        threads = [threading.Thread(target=s.serve_forever, args=(0.02,)) for s in (self._hub, self._cdn)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._release.set()
            for server in (self._hub, self._cdn):
                server.shutdown()
                server.server_close()
            for thread in threads:
                thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that leaves in the middle is what we are here for


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeHub
    server_name: str

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        headers = {k.lower(): v for k, v in self.headers.items()}
        self.fake.seen.append(Seen(self.server_name, self.command, self.path, headers))
        url = urlsplit(self.path)
        path = unquote(url.path)
        if self.server_name == "cdn":
            self._cdn(path.removeprefix("/cdn/"))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"), parse_qs(url.query))
        else:
            repo, _, rest = path.lstrip("/").partition("/resolve/")
            self._resolve(repo, rest.partition("/")[2])

    def _api(self, path: str, query: dict[str, list[str]]) -> None:
        if self._refuse(self._fault(API)):
            return
        name = "/".join(path.split("/")[:2])
        repo = self._open(name, metadata=True)
        if repo is None:
            return
        if "/tree/" in path:
            self._json([self._entry(repo, f) for f in sorted(repo.files)])
            return
        siblings: list[dict[str, Any]] = []
        for file in sorted(repo.files):
            sibling: dict[str, Any] = {"rfilename": file}
            if "blobs" in query:
                entry = self._entry(repo, file)
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}
            siblings.append(sibling)
        gated = "manual" if repo.gated else False
        self._json({"id": name, "modelId": name, "sha": repo.commit, "gated": gated, "private": repo.private}
                   | {"siblings": siblings, "tags": [], "downloads": 0})  # fmt: skip

    def _entry(self, repo: Repo, file: str) -> dict[str, Any]:
        data = repo.files[file]
        size = repo.announced.get(file, len(data))
        entry: dict[str, Any] = {"type": "file", "path": file, "size": size, "oid": git_sha1(data)}
        return entry | {"lfs": {"oid": sha256(data), "size": size, "pointerSize": 134}} if is_large(file) else entry

    def _resolve(self, name: str, file: str) -> None:
        repo = self._open(name)
        if repo is None:
            return
        if file not in repo.files:
            self._empty(404, {"X-Error-Code": "EntryNotFound"})
            return
        data = repo.files[file]
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if is_large(file):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256(data)}"'}
            self._empty(302, {**headers, "Location": f"{self.fake.cdn}/cdn/{sha256(data)}"})
        else:
            self._bytes(file, data, {**headers, "ETag": f'"{git_sha1(data)}"'})

    def _cdn(self, digest: str) -> None:
        if self.headers["Authorization"]:
            self._empty(400, {})  # as S3 does: only one auth mechanism allowed
            return
        for repo in self.fake.repos.values():
            for file, data in repo.files.items():
                if sha256(data) == digest:
                    self._bytes(file, data, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})
                    return
        self._empty(404, {})

    def _open(self, name: str, *, metadata: bool = False) -> Repo | None:
        """The repository, or the Hub's refusal. Metadata of gated ones is public."""
        repo = self.fake.repos.get(name)
        trusted = self.fake.token is not None and self.headers["Authorization"] == f"Bearer {self.fake.token}"
        if self.headers["Authorization"] and not trusted:
            self._empty(401, {})
        elif repo is None or (repo.private and not trusted):
            self._empty(401 if not trusted else 404, {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and not trusted and not metadata:
            self._empty(401, {"X-Error-Code": "GatedRepo"})
        else:
            return repo
        return None

    def _bytes(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        fault = self._fault(name) if self.command == "GET" else None
        if self._refuse(fault):
            return
        if isinstance(fault, Garble):
            data = bytes(b ^ 0xFF for b in data)
        start, end, status = 0, len(data), 200
        wanted = self.headers["Range"]
        if wanted and not isinstance(fault, IgnoreRange):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, status = int(first), 206
            end = min(int(last) + 1, len(data)) if last else len(data)
            if start >= len(data):
                self._empty(416, {"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        body = data[start:end]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(fault, BreakOff | Hold):
            self.wfile.write(body[: fault.after])
            self.wfile.flush()
            body = body[fault.after :]
            if isinstance(fault, BreakOff):
                self.close_connection = True
                return
            self.fake.holding.set()
            self.fake._release.wait(30)
        self.wfile.write(body)

    def _fault(self, what: str) -> Fault | None:
        queue = self.fake.faults[what]
        return queue.popleft() if queue else None

    def _refuse(self, fault: Fault | None) -> bool:
        if not isinstance(fault, Status):
            return False
        self._empty(fault.code, {"Retry-After": fault.retry_after} if fault.retry_after else {})
        return True

    def _empty(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def is_large(name: str) -> bool:
    return name.endswith((".gguf", ".safetensors"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def main() -> None:
    """python -m tests.helpers.fake_hub owner/repo=FILE ...: serve files until stdin closes, to try things by hand."""
    hub = FakeHub()
    for argument in sys.argv[1:]:
        name, _, file = argument.partition("=")
        hub.repos.setdefault(name, Repo({})).files[Path(file).name] = Path(file).read_bytes()
    with hub.running():
        print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
