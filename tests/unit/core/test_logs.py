"""Log lines: one JSON object a line on stderr, never on stdout, and nothing is paid before the first."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from helexa.core import logs


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    logs.configure()


def test_a_line_is_one_json_object_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=True)
    logs.get("part").bind(node="beast").warning("it is down", error="refused", at=[1])
    out, err = capsys.readouterr()
    line = json.loads(err)
    assert out == ""
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "it is down",
        "level": "warning",
        "logger": "part",
        "node": "beast",
        "error": "refused",
        "at": [1],
    }


def test_an_exception_bears_its_traceback_and_any_value_can_be_a_field(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=True)
    try:
        raise ValueError("what went wrong")
    except ValueError:
        logs.get("part").exception("it failed", field=object)
    line = json.loads(capsys.readouterr().err)
    assert "ValueError: what went wrong" in line["exception"]
    assert line["field"] == "<class 'object'>"


def test_lines_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=True, level="warning")
    logs.get("part").info("chatter")
    logs.get("part").error("trouble")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["trouble"]


def test_the_form_for_people_names_the_event_and_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=False)
    logs.get("part").info("it is up", node="beast")
    line = capsys.readouterr().err
    assert "it is up" in line
    assert "node=beast" in line


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match='"loud" is not known'):
        logs.configure(level="loud")


def test_making_a_logger_imports_no_log_library() -> None:
    code = "import sys, helexa.core.logs as logs; logs.get('x'); logs.configure(); sys.exit('structlog' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
