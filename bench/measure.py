"""What the benches share: process trees on chosen cores, what they cost, and tables that say how they came about."""

from __future__ import annotations

import atexit
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import psutil

CACHE = Path(os.environ.get("HELEXA_BENCH_DIR", Path.home() / ".cache" / "helexa-bench"))


def scratch() -> Path:
    """A folder for this run's configurations and logs, gone with the program; what went wrong is told before that."""
    folder = Path(tempfile.mkdtemp(prefix="helexa-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def compiled(source: Path) -> Path:
    """A C program of ours, built where it is not yet or has changed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    out = CACHE / source.stem
    if not out.exists() or out.stat().st_mtime < source.stat().st_mtime:
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", out, source], check=True)
    return out


def cpu_ns(pid: int) -> int:
    """Time on a core of every thread that lives, nanoseconds (/proc/.../schedstat)."""
    total = 0
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return 0
    for task in tasks:
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except OSError:
            continue
    return total


def memory_mb(pid: int, kind: str = "Pss") -> float:
    """kind: Pss, where memory that is shared with others is counted in shares, or Rss, where it is counted whole."""
    try:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(r.split()[1]) for r in rows if r.startswith(f"{kind}:")) / 1024


class Tree:
    """A process and all that it started, pinned to `cores`."""

    def __init__(
        self, command: Sequence[str | Path], *, cores: str, log: Path, env: dict[str, str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                ["taskset", "-c", cores, *map(str, command)],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def members(self) -> list[int]:
        try:
            root = psutil.Process(self.process.pid)
            return [root.pid, *(p.pid for p in root.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def cpu_ns(self) -> int:
        return sum(cpu_ns(pid) for pid in self.members())

    def pss_mb(self) -> float:
        return sum(memory_mb(pid) for pid in self.members())

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, what: signal.Signals) -> None:
        for pid in self.members():
            try:
                os.kill(pid, what)
            except ProcessLookupError:
                continue

    def stop(self) -> None:
        members = [psutil.Process(p) for p in self.members() if psutil.pid_exists(p)]
        self.thaw()
        self._signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(members, timeout=5)
        for process in alive:
            process.kill()
        self.process.wait()


def cores_in(text: str) -> set[int]:
    """taskset's notation: "0,2-3"."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def pin(pid: int, cores: str) -> None:
    """A process that runs already, all its threads; those that it will make inherit it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores_in(cores))


class Others:
    """What else the machine does: cores that are busy with neither this process nor `trees`, since `start`."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        self._trees = trees
        self.start()

    def start(self) -> None:
        self._since = time.monotonic(), self._cpu_s()

    def cores(self) -> float:
        since, before = self._since
        return max(0.0, (self._cpu_s() - before) / (time.monotonic() - since))

    def _cpu_s(self) -> float:
        ours = time.process_time() + sum(tree.cpu_ns() for tree in self._trees) / 1e9
        times = psutil.cpu_times()
        return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice) - ours


@contextmanager
def running(*args: object, **kwargs: object) -> Iterator[Tree]:
    tree = Tree(*args, **kwargs)  # type: ignore[arg-type]
    try:
        yield tree
    finally:
        tree.stop()


def wait_for_port(port: int, tree: Tree, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if tree.process.poll() is not None:
            break
        with socket.socket() as s:
            s.settimeout(1)
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    tail = tree.log.read_text(errors="replace")[-2000:]
    raise SystemExit(f"nothing listens on port {port}; {tree.log} ends with:\n{tail}")


def machine() -> str:
    """One line that says where the figures are from."""
    model = next(
        (r.split(":", 1)[1].strip() for r in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in r), "?"
    )
    flags = next((r for r in Path("/proc/cpuinfo").read_text().splitlines() if r.startswith("flags")), "")
    wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f" {f} " in f"{flags} "]
    return (
        f"{model}, {os.cpu_count()} cores ({' '.join(wide)}), Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}"
    )


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and the least and the greatest behind it."""
    if not values:
        return "-"
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], out: TextIO | None = None) -> None:
    """A Markdown table, columns aligned."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    stream = out if out is not None else sys.stdout
    for n, row in enumerate([head, *rows]):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |", file=stream)
        if n == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|", file=stream)


def need(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise SystemExit(f"{program} is not installed: apt-get install {package}")
    return found
