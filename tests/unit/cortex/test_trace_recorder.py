"""The file of a trace: bounded, private, whole lines only, and no harm to anybody where it cannot be written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from tests.helpers import exchanges

from helexa.core.relay.contract import Exchange, Usage
from helexa.cortex import trace_recorder
from helexa.cortex.prefixes import Prompt
from helexa.cortex.simulate import trace
from helexa.cortex.trace_recorder import CannotRecord, TraceFile, TraceRecorder


def exchange(t_start: float = 100.0, usage: Usage | None = None) -> Exchange:
    made = exchanges.exchange({})
    made.t_start, made.usage = t_start, usage
    return made


def recorder(path: Path, max_bytes: int = 1 << 20) -> TraceRecorder:
    return TraceRecorder(path, max_bytes=max_bytes, wall=lambda: 1_764_000_000.0, clock=lambda: 100.0)


def test_what_ended_is_recorded_with_its_begin_its_tokens_and_its_prefixes(tmp_path: Path) -> None:
    made = recorder(tmp_path / "t.jsonl")
    late, early = exchange(t_start=103.5, usage=Usage(40, 20)), exchange(t_start=101.0)
    made.add(late, "qwen", Prompt([7, 9], [300.0, 700.0], 700.0))
    made.add(early, "phi", Prompt([7], [300.0], 400.0))
    made.add(exchange(t_start=104.0), "embed", None)
    made.close()
    first, second, third = trace.read(tmp_path / "t.jsonl")
    assert (first.t, first.model, first.prompt_tokens, first.output_tokens) == (0.0, "phi", 100, 0)
    assert (second.t, second.model, second.prompt_tokens, second.output_tokens) == (2.5, "qwen", 40, 20)
    assert (third.t, third.prefix) == (3.0, [] or ())
    assert (len(second.prefix), second.prefix[0]) == (2, first.prefix[0]), "the same beginning has the same id"
    assert list(second.ends) == [17, 40], "in tokens, as the prompt's own count has them"
    assert 7 not in second.prefix, "but not one that can be looked up"
    assert "1764000001" in (tmp_path / "t.jsonl").read_text()


def test_another_start_has_other_ids(tmp_path: Path) -> None:
    for name in ("a", "b"):
        made = recorder(tmp_path / name)
        made.add(exchange(), "qwen", Prompt([7], [300.0], 300.0))
        made.close()
    assert trace.read(tmp_path / "a")[0].prefix != trace.read(tmp_path / "b")[0].prefix


def test_the_file_is_its_owners_alone_also_where_it_was_not(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.touch(0o644)
    TraceFile(path, 1000).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_begins_anew_when_it_is_full_and_keeps_one_of_before(tmp_path: Path) -> None:
    file = TraceFile(tmp_path / "t.jsonl", 100)
    for number in range(20):
        file.append(b"%-29d\n" % number)
    file.close()
    kept = [(tmp_path / name).read_bytes() for name in ("t.jsonl.1", "t.jsonl")]
    assert [len(lines) for lines in kept] == [90, 60]
    assert [int(line) for lines in kept for line in lines.splitlines()] == [15, 16, 17, 18, 19]
    assert stat.S_IMODE((tmp_path / "t.jsonl").stat().st_mode) == 0o600


def test_a_turn_that_could_not_open_the_new_file_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = TraceFile(tmp_path / "t.jsonl", 10)
    file.append(b"12345678\n")

    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(trace_recorder, "_open", none_left)
        file.append(b"lost\n")
        assert file.failed
    file.append(b"kept\n")
    file.close()
    assert (tmp_path / "t.jsonl").read_bytes() == b"kept\n"
    assert (tmp_path / "t.jsonl.1").read_bytes() == b"12345678\n"


def test_it_goes_on_after_what_was_there_without_the_half_line_of_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"one\ntwo\nthr")
    file = TraceFile(path, 1000)
    file.append(b"four\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\nfour\n"


def test_a_full_disk_is_told_once_leaves_no_half_line_and_is_over_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = TraceFile(tmp_path / "t.jsonl", 1000)
    file.append(b"one\n")
    real = os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) > 2:
            return real(fd, bytes(data)[:2])  # half of it fits
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        file.append(b"two\n")
        file.append(b"three\n")
    file.append(b"four\n")
    file.close()
    assert (tmp_path / "t.jsonl").read_bytes() == b"one\nfour\n"
    told = capsys.readouterr().err
    assert told.count("cannot be written") == 1
    assert told.count("written again") == 1


def test_a_path_that_cannot_be_had_is_told_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(CannotRecord, match=r"\[trace\] path = .*nowhere.*No such file"):
        TraceFile(tmp_path / "nowhere" / "t.jsonl", 1000)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CannotRecord):
        TraceFile(tmp_path / "link", 1000)
