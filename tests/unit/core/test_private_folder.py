from __future__ import annotations

import os
from pathlib import Path

import pytest

from helexa.core import private_folder
from helexa.core.private_folder import PrivateFolder


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_folder, "YOUNG_S", -1)
    living = PrivateFolder(tmp_path, "ours-")
    dead = PrivateFolder(tmp_path, "ours-")
    os.close(dead._lock)  # as the kernel does when a process dies
    strange = tmp_path / "ours-strange"  # without a lock: not of this kind
    strange.mkdir()
    PrivateFolder(tmp_path, "ours-").remove()
    assert living.path.exists()
    assert not dead.path.exists()
    assert strange.exists()
    living.remove()


def test_a_folder_that_has_just_been_made_is_left_alone(tmp_path: Path) -> None:
    young = PrivateFolder(tmp_path, "ours-")
    os.close(young._lock)
    PrivateFolder(tmp_path, "ours-").remove()
    assert young.path.exists()
