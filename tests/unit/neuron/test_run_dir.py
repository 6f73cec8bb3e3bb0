from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helexa.core.settings_file import ConfigError
from helexa.neuron.run_dir import RunDir


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name is short enough for sockets; pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="rd-") as folder:
        yield Path(folder)


def test_the_folder_is_private_and_goes_away(short: Path) -> None:
    folder = RunDir(str(short), {})
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert folder.new_socket() != folder.new_socket()
    assert folder.new_socket().parent == folder.path
    folder.remove()
    folder.remove()
    assert not folder.path.exists()


def test_the_users_runtime_folder_is_taken_before_tmp(short: Path) -> None:
    folder = RunDir(None, {"XDG_RUNTIME_DIR": str(short)})
    assert folder.path.parent == short / "helexa"
    folder.remove()
    elsewhere = RunDir(None, {"XDG_RUNTIME_DIR": str(short / ("x" * 120))})
    assert short not in elsewhere.path.parents
    elsewhere.remove()


def test_a_folder_too_long_for_a_socket_is_refused_with_the_setting(short: Path) -> None:
    with pytest.raises(ConfigError, match=r"run_dir .*107 bytes"):
        RunDir(str(short / ("x" * 90)), {})


def test_a_folder_that_cannot_be_made_is_refused(short: Path) -> None:
    (short / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        RunDir(str(short / "file" / "below"), {})
