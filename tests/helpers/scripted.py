"""A harness whose engine is a small real HTTP server that does as it is told: streams, stalls, dies and lies.

Its model files are a line that begins with GGUF and goes on as JSON, the `Script` of the load:

    needs_mb, slots      what the plan says
    gate                 a FIFO (see Gate): the load waits there until the test opens it
    fail                 the load fails with this reason
    die                  so many loads die (exit code 7) before one succeeds
    noise                printed to stdout and stderr during the load
    deaf                 the engine never closes, or, a FIFO, not before the test opens it
    hold_interpreter     the load goes on for ever and holds the GIL, as an engine in C may
    worker               the engine has a thread that works when a request says "work"
    ranks                the host asks to be watched (step_watch.py), and has so many processes beside it
    keeps                the engine has a prompt cache that can be saved (see Memory); "dies": and dies when restored to

A request says what to do in its body: {"do": "answer" | "stream" | "stall" | "burn" | "die" | "lie" | "talk" | "hang"}.
How often a model was loaded stands in a file beside it, and in another one how often a host was begun that only counts
its tokens, which takes COUNTING_MB and heeds no more of the script than `fail`.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import queue
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from helexa.core.errors import BadRequest, HelexaError, NeverLoads
from helexa.core.lifecycle import DeviceEstimate, Estimate, LoadRequest
from helexa.core.relay.contract import Exchange
from helexa.core.relay.upstream import Upstream
from helexa.neuron.harness.base import (
    CACHE_BLOCK,
    CacheFailed,
    FreeDevice,
    Harness,
    ModelFacts,
    ModelFiles,
    Plan,
    Prepared,
    Saved,
    SlotUse,
)
from helexa.neuron.step_watch import StepReport, report_of

EXIT_CODE = 7
COUNTING_MB = 40


class Script(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    needs_mb: int = 50
    slots: int = 2
    gate: str | None = None
    fail: str | None = None
    die: int = 0
    noise: str | None = None
    deaf: bool | str = False
    hold_interpreter: bool = False
    truncated: bool = False
    keeps: str | None = None
    ranks: int | None = None
    worker: bool = False


def write_model(path: Path, script: Script | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + msgspec.json.encode(script or Script()) + b"\n")
    return path


def loads_of(path: Path) -> int:
    """How many loads of this file were begun in a host."""
    marks = path.with_suffix(".loads")
    return marks.stat().st_size if marks.exists() else 0


def counting_hosts_of(path: Path) -> int:
    """How many hosts were begun to count its tokens."""
    marks = path.with_suffix(".counts")
    return marks.stat().st_size if marks.exists() else 0


class Gate:
    """Where a load waits: a named pipe, so that the test knows that the host is there, and the host cannot go on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = -1

    async def reached(self) -> None:
        """Returns when a load stands before the gate."""
        while self._fd < 0:
            try:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as err:
                if err.errno != errno.ENXIO:
                    raise
                await asyncio.sleep(0.002)

    def open(self) -> None:
        os.write(self._fd, b"!")
        self.close()

    def close(self) -> None:
        """For a load that does not come through any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ScriptedHarness:
    name = "scripted"
    format = "gguf"
    own_process = False

    def engine_version(self) -> str | None:
        return "1"

    def why_not(self) -> str | None:
        return None

    def warm(self) -> None:
        pass

    def can_serve(self, files: ModelFiles) -> bool:
        return files.files[0].suffix == ".gguf"

    def inspect(self, files: ModelFiles, request: LoadRequest) -> ModelFacts:
        script = _script(files.files[0])
        if script.truncated:
            raise NeverLoads(f"{files.files[0]} is not whole", code="file_not_whole")
        return ModelFacts("scripted", "chat", 4096, 1, files.size_bytes, None, ("chat",), {"script": script})

    def plan(self, request: LoadRequest, files: ModelFiles, facts: ModelFacts, devices: Sequence[FreeDevice]) -> Plan:
        script: Script = facts.extra["script"]
        if request.slots == 0:
            raise BadRequest("slots must be at least 1", param="slots")
        device = next((d for d in devices if request.devices is None or d.index in request.devices), None)
        if device is None:
            return Plan(request, files, facts, Estimate(devices=[], why="there is no such device"), 0, 0, ())
        part = DeviceEstimate(
            index=device.index, weights_mb=script.needs_mb, kv_mb=0, overhead_mb=0, free_mb=device.free_mb
        )
        why = f"{script.needs_mb} MB of {device.free_mb} MB" if script.needs_mb > device.free_mb else None
        slots = request.slots or script.slots
        context = request.context or 4096
        return Plan(request, files, facts, Estimate(devices=[part], why=why), context, slots, (device.index,))

    def host_spec(self, plan: Plan, socket: Path, api_key: str, states: Path | None = None) -> dict[str, Any]:
        return {
            "file": str(plan.files.files[0]),
            "socket": str(socket),
            "api_key": api_key,
            "states": str(states) if states else None,
        }

    def counting_spec(self, plan: Plan, socket: Path, api_key: str) -> dict[str, Any]:
        return {**self.host_spec(plan, socket, api_key), "counts": True}

    def counter(self) -> Harness:
        return self

    def counting_mb(self, plan: Plan) -> int:
        return COUNTING_MB

    def serve(self, spec: dict[str, Any], progress: Callable[[float], None]) -> ScriptedEngine:
        path = Path(spec["file"])
        script = _script(path)
        if spec.get("counts"):
            with path.with_suffix(".counts").open("ab") as marks:
                marks.write(b".")
            if script.fail:
                raise RuntimeError(script.fail)
            return ScriptedEngine(spec["socket"], spec["api_key"], script, None)
        with path.with_suffix(".loads").open("ab") as marks:
            marks.write(b".")
        if script.noise:
            print(script.noise)
            os.write(1, script.noise.encode() + b"\n")
            os.write(2, script.noise.encode() + b"\n")
        progress(0.5)
        if script.gate:
            with open(script.gate, "rb") as gate:
                gate.read(1)
            progress(0.6)
        if script.hold_interpreter:
            ctypes.PyDLL(None).sleep(600)
        if loads_of(path) <= script.die:
            os.write(2, b"the script says die\n")
            os._exit(EXIT_CODE)
        if script.fail:
            raise RuntimeError(script.fail)
        return ScriptedEngine(spec["socket"], spec["api_key"], script, spec["states"])

    def session(self, plan: Plan) -> ScriptedSession:
        return ScriptedSession()

    def prompt_cache(self, plan: Plan) -> ScriptedCache | None:
        return ScriptedCache(plan) if plan.facts.extra["script"].keeps else None


class ScriptedSession:
    async def learn(self, engine: Upstream) -> None:
        pass

    def prepare(self, exchange: Exchange) -> Prepared:
        return Prepared()

    def refusal(self, exchange: Exchange, status: int, body: bytes) -> HelexaError | None:
        return None

    def check_chats(self) -> None:
        pass

    async def count_tokens(self, body: bytes, engine: Upstream) -> int:
        await engine.fetch("POST", "/v1/chat/completions", b"{}")  # it is there
        return len(body.split())


class ScriptedCache:
    def __init__(self, plan: Plan) -> None:
        self.fingerprint = f"scripted {plan.context} {plan.slots}"

    async def slots(self, engine: Upstream) -> list[SlotUse]:
        answer = await engine.fetch("POST", "/slots", b"{}")
        return [SlotUse(*slot) for slot in answer.json()]

    async def save(self, engine: Upstream, slot: int, file: Path) -> Saved:
        return Saved(*await self._act(engine, {"save": slot, "file": file.name}))

    async def restore(self, engine: Upstream, slot: int, file: Path) -> None:
        await self._act(engine, {"restore": slot, "file": file.name})

    async def _act(self, engine: Upstream, order: dict[str, Any]) -> Any:
        answer = await engine.fetch("POST", "/slots", json.dumps(order).encode())
        if answer.status != 200:
            raise CacheFailed(answer.body.decode())
        return answer.json()


class Memory:
    """Two texts that the engine remembers, a character a token. A talk goes to the one that it begins with, else to
    the one that was used least lately, and is answered with how many characters were known."""

    def __init__(self, folder: str | None, dies: bool) -> None:
        self._folder = folder
        self._dies = dies
        self._texts = ["", ""]
        self._stamps: list[int | None] = [None, None]
        self._stamp = 0

    def talk(self, text: str) -> dict[str, int]:
        known = [_shared(text, held) for held in self._texts]
        slot = known.index(max(known)) if max(known) else min((1, 0), key=lambda i: self._stamps[i] or 0)
        self._stamp += 1
        self._texts[slot], self._stamps[slot] = text, self._stamp
        return {"known": known[slot], "slot": slot}

    def act(self, order: dict[str, Any]) -> Any:
        if "file" not in order:
            return [[i, len(self._texts[i]), self._stamps[i]] for i in (0, 1)]
        assert self._folder is not None
        file = Path(self._folder, order["file"])
        if "save" in order:
            assert file.stat().st_mode & 0o777 == 0o600
            text = self._texts[order["save"]]
            file.write_text(text)
            ends = range(CACHE_BLOCK, len(text) + 1, CACHE_BLOCK)
            return [len(text), [xxhash.xxh3_64_hexdigest(text[:end].encode()) for end in ends]]
        if self._dies:
            os._exit(EXIT_CODE)
        self._texts[order["restore"]] = file.read_text()
        return None


class ScriptedEngine:
    def __init__(self, socket: str, api_key: str, script: Script, states: str | None) -> None:
        self._script = script
        self._server = _Server(socket, _Handler)
        self._server.api_key = api_key
        self._server.memory = Memory(states, script.keeps == "dies")
        self._server.worker = _Worker() if script.worker else None
        self._server.report = None if script.ranks is None else StepReport.create(report_of(Path(socket)))
        if self._server.report is not None:
            self._server.report.ranks([_rank() for _ in range(script.ranks or 0)])
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        if isinstance(self._script.deaf, str):
            with open(self._script.deaf, "rb") as gate:
                gate.read(1)
        while self._script.deaf is True:
            time.sleep(60)
        self._server.shutdown()
        self._server.server_close()


class _Worker:
    """A thread that is there from the load on and works when it is asked to."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def work(self) -> None:
        done = threading.Event()
        self._asked.put(done)
        done.wait()

    def _run(self) -> None:
        while True:
            done = self._asked.get()
            burn()
            done.set()


def burn() -> None:
    """A tenth of a second of this thread's work."""
    until = time.thread_time() + 0.1
    while time.thread_time() < until:
        pass


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    api_key = ""
    memory: Memory
    worker: _Worker | None
    report: StepReport | None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is nothing to tell of."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        order = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        if self.headers["authorization"] != f"Bearer {self.server.api_key}":
            self._answer(401, {"error": "bad key"})
            return
        do = order.get("do", "answer")
        if self.path == "/slots":
            self._answer(200, self.server.memory.act(order))
        elif do == "talk":
            self._answer(200, self.server.memory.talk(order["text"]))
        elif do == "answer":
            self._answer(200, {"pid": os.getpid()})
        elif do == "burn":
            burn()
            self._answer(200, {})
        elif do == "work":
            assert self.server.worker is not None
            self.server.worker.work()
            self._answer(200, {})
        elif do == "hang":
            assert self.server.report is not None
            self.server.report.begin(usual_s=0.01)
            self._begin_stream()
            self._chunk(b"data: 1\n\n")
            os.kill(os.getpid(), signal.SIGSTOP)
        elif do == "lie":
            self.wfile.write(b"HTTP/1.1 two hundred\r\n\r\n")
        elif do == "die":
            os._exit(EXIT_CODE)
        else:
            self._begin_stream()
            for number in range(order.get("chunks", 3)):
                self._chunk(b'data: {"n":%d}\n\n' % number)
            if do == "stall":
                self.rfile.read(1)  # until the client leaves
            self._chunk(b"")

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _rank() -> int:
    """A process beside the host, which does not look after itself."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True).pid


def _script(path: Path) -> Script:
    return msgspec.json.decode(path.read_bytes()[4:], type=Script)


def _shared(one: str, other: str) -> int:
    """Characters that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
