"""One rank as a process, spoken to over its pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from helexa.neuron.tp import rpc
from helexa.neuron.tp.comm import Comm

NEURON = [sys.executable, "-P", "-m", "helexa.neuron"]


PLACE = ("--rank", "1", "--world-size", "2", "--device", "5")


def rank(*args: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    return running(*NEURON, "--worker", *(args or PLACE))


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def ask(process: subprocess.Popen[bytes], *frames: bytes) -> list[dict[str, Any]]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"".join(frame + b"\n" for frame in frames))
    process.stdin.flush()
    return [json.loads(process.stdout.readline()) for _ in frames]


def test_a_rank_answers_each_request_once_and_outlives_what_it_cannot_read() -> None:
    with rank() as process:
        answers = ask(
            process,
            b'{"op":"ping","id":1}',
            b'{"op":"dance","id":2}',
            b"not json",
            b'{"op":"nccl_sanity_check","id":3}',
            b'{"op":"init","comm_id":"zz","id":4}',
            b'{"op":"load_shard","spec":{},"id":5}',
            b'{"op":"step","step":[[]],"id":6}',
            b'{"op":"clear","id":7}',
            b'{"op":"unload","id":8}',
            b"x" * (rpc.MAX_FRAME + 1),
            b'{"op":"ping"}',
        )
        assert answers[0] == {"op": "pong", "id": 1, "rank": 1, "world_size": 2, "cuda_device": 5}
        assert [(a["op"], a.get("kind"), a.get("id")) for a in answers[1:]] == [
            ("error", "unknown_op", 2),
            ("error", "bad_request", None),
            ("error", "not_initialised", 3),
            ("error", "bad_request", 4),
            ("error", "not_initialised", 5),
            ("error", "not_initialised", 6),
            ("error", "not_initialised", 7),
            ("unload_ok", None, 8),
            ("error", "bad_request", None),
            ("pong", None, None),
        ]
        assert ask(process, b'{"op":"shutdown","id":9}') == [{"op": "bye", "id": 9}]
        assert process.wait(10) == 0


def test_init_where_torch_is_not_installed_says_how_to_get_it() -> None:
    hidden = "import sys; sys.modules['torch'] = None; from helexa.neuron.tp.worker import main; main()"
    made = Comm("gloo", "/nowhere/at-all", "0")
    with running(sys.executable, "-c", hidden, *PLACE) as process:
        answer, last = ask(process, rpc.line(rpc.Init(comm_id=made.id, id=1))[:-1], b'{"op":"shutdown"}')
    assert (answer["op"], answer["kind"]) == ("error", "collective_unavailable")
    assert "helexa[torch]" in answer["message"]
    assert last == {"op": "bye"}


@pytest.mark.parametrize("half", [b"", b'{"op":"pi'])
def test_the_end_of_stdin_ends_a_rank_and_half_a_frame_is_dropped(half: bytes) -> None:
    with rank() as process:
        ask(process, b'{"op":"ping"}')
        assert process.stdin is not None
        process.stdin.write(half)
        process.stdin.close()
        assert process.wait(10) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b""
        assert process.stderr is not None
        assert (b"inside a frame" in process.stderr.read()) == bool(half)


def test_what_a_library_prints_to_stdout_breaks_no_frame() -> None:
    noisy = (
        "import ctypes, os, sys, threading\n"
        "from helexa.neuron.tp import worker\n"
        "answer = worker.Worker.answer\n"
        "def loud(self, line):\n"
        "    print('a print')\n"
        "    libc = ctypes.CDLL(None); libc.printf(b'a C printf\\n'); libc.fflush(None)\n"
        "    os.write(1, b'a write')\n"
        "    return answer(self, line)\n"
        "worker.Worker.answer = loud\n"
        "worker.main()\n"
    )
    with running(sys.executable, "-c", noisy, *PLACE) as process:
        answers = ask(process, b'{"op":"ping"}', b'{"op":"shutdown"}')
        assert process.wait(10) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b"", "nothing but frames"
        assert process.stderr is not None
        assert b"a C printf" in process.stderr.read()
    assert [answer["op"] for answer in answers] == ["pong", "bye"]


@pytest.mark.parametrize(
    "args", [("--rank", "2", "--world-size", "2", "--device", "0"), ("--rank", "1"), ("--rank", "x")]
)
def test_a_wrong_call_is_told_on_stderr_with_exit_code_2(args: tuple[str, ...]) -> None:
    said = subprocess.run([*NEURON, "--worker", *args], capture_output=True, timeout=30, check=False)
    assert said.returncode == 2
    assert b"--rank" in said.stderr or b"--world-size" in said.stderr
    assert said.stdout == b""


def test_a_rank_whose_leader_is_another_process_than_it_was_told_ends_at_once() -> None:
    with rank("--rank", "1", "--world-size", "2", "--device", "0", "--parent", str(os.getpid() + 1)) as process:
        assert process.wait(10) == 0
