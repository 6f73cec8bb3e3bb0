"""The engine in the host process: orders in, a llama.cpp server on a Unix socket out. The only module of ours that
imports xllamacpp, and only when told to.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket as unix
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

from helexa.neuron.harness.cores import usable_cores
from helexa.neuron.harness.llama.vocabulary import write_vocabulary

READ_BYTES: Final = 8 << 20
# How ggml says on its back ends that there is no more: it has no error codes.
NO_MEMORY: Final = ("out of memory", "failed to allocate", "unable to allocate")
READ_SHARE: Final = 0.8  # of a load's progress: the file's bytes; the rest is the engine's own
LOG_WAIT_S: Final = 1.0
LOG_BYTES: Final = 1 << 20
LAST_WORDS: Final = "exiting due to"
LOOP_S: Final = 10.0
HTTP_THREADS_SPARE: Final = 8  # health checks, cancels, connections that are being closed


def warm() -> None:
    """Import the engine, so that a load does not pay for it."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # its backtrace starts a debugger, which hangs without a terminal
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which discovery counts
    if usable_cores() <= 2:
        # Every core is the engine's there (default_threads), and its threads, which would wait for each other turning
        # in a circle, stand in the way of the one they wait for as soon as anything else runs: 5 tok/s, and 30 to 50
        # when they sleep. Read once, when the engine is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import xllamacpp  # noqa: F401


def engine_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("xllamacpp")
    except PackageNotFoundError:
        return None


# Standard error is the process's, so one load at a time where models share a process. None loses by it: the engine
# holds the interpreter while it loads.
_one_load = threading.Lock()


class Engine:
    """A loaded model that answers on its socket until `close()`."""

    def __init__(self, server: Any, socket: Path) -> None:
        self._server = server
        self._socket = socket

    def close(self) -> None:
        """Ends the server: requests that still run are cut, memory goes back. Blocks for some 50 ms."""
        self._server = None  # the last reference: its destructor stops the loop and joins the threads
        self._socket.unlink(missing_ok=True)
        if sys.platform == "linux":
            with suppress(OSError, AttributeError):  # 100 MB stay with the allocator otherwise; musl has none
                ctypes.CDLL(None).malloc_trim(0)


def serve(spec: dict[str, Any], progress: Callable[[float], None]) -> Engine:
    """Load, and answer on spec["socket"]. Blocks, the interpreter too: the engine holds it while it loads.

    Raises RuntimeError with the engine's own reason, MemoryError where that is a want of memory.
    """
    warm()
    import xllamacpp

    socket = Path(spec["socket"])
    _check(spec, socket)
    progress(0.0)
    vocabulary = socket.with_suffix(".gguf") if spec["counts"] else None
    if vocabulary is not None:
        write_vocabulary(Path(spec["files"][0]), vocabulary)
        spec = {**spec, "files": [str(vocabulary)]}
    else:
        _read_ahead([Path(p) for p in spec["files"]], lambda fraction: progress(fraction * READ_SHARE))
    params = build_params(spec)
    socket.unlink(missing_ok=True)
    with _one_load, _LogTail() as log:
        try:
            server = xllamacpp.Server(params)
        except Exception as err:
            reason = log.reason() or str(err)
            socket.unlink(missing_ok=True)
            kind = MemoryError if any(words in reason.lower() for words in NO_MEMORY) else RuntimeError
            raise kind(f"llama.cpp could not load {spec['model_id']}: {reason}") from err
        finally:
            if vocabulary is not None:
                vocabulary.unlink()  # it has been read, not mapped
    _await_loop(socket, spec["api_key"])
    progress(1.0)
    return Engine(server, socket)


def _await_loop(socket: Path, api_key: str) -> None:
    """Returns when the server's loop takes up work, some milliseconds after its constructor did.

    The destructor tells the loop to end and waits for it, with the interpreter in its hands; a loop that begins only
    then has missed the word, and both wait for ever (one drop in ten, right after the constructor). The slots are told
    by the loop itself. A server that does not answer is left to whoever asks it next.
    """
    ask = f"GET /slots HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {api_key}\r\nConnection: close\r\n\r\n"
    with suppress(OSError), unix.socket(unix.AF_UNIX) as connection:
        connection.settimeout(LOOP_S)
        connection.connect(str(socket))
        connection.sendall(ask.encode())
        while connection.recv(4096):
            pass


def _check(spec: dict[str, Any], socket: Path) -> None:
    """What the engine would answer with a bare failure, or with an abort."""
    named = [*spec["files"], *spec["lora"], *(spec[key] for key in ("projector", "draft") if spec[key])]
    for name in named:
        if not os.access(name, os.R_OK):
            raise RuntimeError(f"{name} is not there, or may not be read")
    if len(os.fsencode(socket)) > 107:  # sockaddr_un; the engine would cut it
        raise RuntimeError(f"the socket's path is too long ({socket}): set run_dir to a shorter one")
    options = spec["options"]
    if options["slots"] < 1 or options["batch"] < 2 or options["n_ctx"] < 1:
        raise RuntimeError("slots, batch and context must be positive")  # the engine would hang, or abort


def _read_ahead(files: list[Path], progress: Callable[[float], None]) -> None:
    """Bring the files into the page cache, so that there is progress to tell while the disk is at work.

    The engine, which then maps them, tells nothing. Where they would not fit in memory the reading is left to it.
    """
    import psutil

    total = sum(path.stat().st_size for path in files)
    if total > psutil.virtual_memory().available * 0.8:
        return
    done = 0
    buffer = bytearray(READ_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                done += count
                progress(min(done / max(total, 1), 1.0))


def build_params(spec: dict[str, Any]) -> Any:
    """CommonParams with every option of the profile; nothing that we promise is left to the engine's defaults."""
    import xllamacpp as x

    o = spec["options"]
    p = x.CommonParams()
    p.model.path = spec["files"][0]
    p.model_alias = {spec["model_id"]}
    p.hostnames = [spec["socket"]]
    p.api_keys = [spec["api_key"]]
    p.n_threads_http = 2 * o["slots"] + HTTP_THREADS_SPARE  # a kept-alive connection holds a thread
    p.endpoint_slots = True
    if spec["states"]:
        p.slot_save_path = spec["states"].rstrip("/") + "/"  # it puts the name right behind
    p.endpoint_props = False  # changes by POST; reading is always there
    p.ui = False
    p.fit_params = False  # the plan has decided; it would load the vocabulary twice to decide again
    p.use_jinja = True

    p.n_parallel = o["slots"]
    p.n_ctx = o["n_ctx"]
    p.ctx_shift = (
        False  # what does not fit is refused, and what grows to the end stops there: nothing is cut in silence
    )
    p.kv_unified = o["kv_unified"]
    p.n_batch = o["batch"]
    p.n_ubatch = o["ubatch"]
    p.cpuparams.n_threads = o["threads"]
    p.cpuparams_batch.n_threads = o["threads"]
    p.cache_type_k = p.cache_type_v = getattr(x.ggml_type, f"GGML_TYPE_{o['kv_type'].upper()}")
    p.flash_attn_type = {
        None: x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO,
        True: x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        False: x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    }[o["flash_attention"]]
    p.cache_ram_mib = o["prompt_cache_mb"]
    p.n_ctx_checkpoints = o["checkpoints"]
    p.load_mode = x.llama_load_mode.LLAMA_LOAD_MODE_MMAP if o["mmap"] else x.llama_load_mode.LLAMA_LOAD_MODE_NONE

    p.n_gpu_layers = o["gpu_layers"]
    p.main_gpu = o["main_gpu"]
    p.split_mode = getattr(x.llama_split_mode, f"LLAMA_SPLIT_MODE_{o['split'].upper()}")
    if o["tensor_split"]:
        places = len(p.tensor_split)
        p.tensor_split = (o["tensor_split"] + [0.0] * places)[:places]

    if o["task"] == "embed":
        p.embedding = True
        if not o["pooling"]:  # absent, or "none": every token its own vector, which no client understands
            p.pooling_type = x.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    elif o["task"] == "rerank":
        p.embedding = True
        p.pooling_type = x.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    if o["chat_template"] is not None:
        p.chat_template = o["chat_template"]
    if spec["projector"]:
        p.mmproj.path = spec["projector"]
        p.mmproj_use_gpu = o["gpu_layers"] > 0
    if spec["lora"]:
        p.lora_adapters = [x.CommonAdapterLoraInfo(path, 1.0) for path in spec["lora"]]
    if spec["draft"]:
        p.speculative.draft.mparams.path = spec["draft"]
        p.speculative.draft.n_gpu_layers = o["draft_gpu_layers"]
        p.speculative.types = [x.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    return p


class _LogTail:
    """Standard error goes through `tee` meanwhile: on to where it went, and into a file that can be looked at.

    A pipe that we emptied ourselves would fill up, because the engine holds the interpreter; and were the log written
    to a file alone, it would be lost with the process when the engine aborts.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._tee: subprocess.Popen[bytes] | None = None
        self._saved = -1

    def __enter__(self) -> _LogTail:
        try:
            sys.stderr.flush()
            self._tee = subprocess.Popen(
                ["tee", f"/dev/fd/{self._file.fileno()}"],
                stdin=subprocess.PIPE,
                stdout=2,
                pass_fds=(self._file.fileno(),),
            )
        except OSError:
            return self  # no tee here: the reason stays in the log alone
        assert self._tee.stdin is not None
        self._saved = os.dup(2)
        os.dup2(self._tee.stdin.fileno(), 2)
        return self

    def close(self) -> None:
        """Standard error is as before, and the log complete."""
        if self._tee is None:
            return
        os.dup2(self._saved, 2)
        os.close(self._saved)
        assert self._tee.stdin is not None
        self._tee.stdin.close()
        self._tee.wait()
        self._tee = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._file.close()

    def reason(self) -> str | None:
        """Why the engine gave up. It writes its log from a thread, which may be behind: its last line is waited for."""
        deadline = time.monotonic() + LOG_WAIT_S
        while True:
            text = os.pread(self._file.fileno(), LOG_BYTES, 0).decode("utf-8", "replace")
            if LAST_WORDS in text or time.monotonic() > deadline or self._tee is None:
                return reason_in(text)
            time.sleep(0.01)


_LINE: Final = re.compile(r"^[\d.]+ (?P<level>[IWED]) +(?P<where>\S*) +(?P<what>.*)$")
# Lines that only say that it failed.
_EMPTY_WORDS: Final = (
    LAST_WORDS,
    "cleaning up",
    "failed to load model",
    "failed to create_context",
    "please check",
)


def reason_in(log: str) -> str | None:
    """The first error in an engine's log that says something, else the first at all."""
    errors = []
    for line in log.splitlines():
        match = _LINE.match(line)
        if match and match["level"] == "E":
            errors.append(match["what"].strip())
        elif "GGML_ASSERT" in line or "terminate called" in line:
            errors.append(line.strip())
    telling = [e for e in errors if not any(words in e for words in _EMPTY_WORDS)]
    return (telling or errors or [None])[0]
