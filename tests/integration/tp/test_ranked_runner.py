"""Real ranks behind a Runner, with a toy for their shard: steps, and whatever may happen in them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.helpers.neuron_daemon import OURS

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'helexa[torch]'")

from tests.helpers import toy_shard  # noqa: E402

from helexa.neuron.harness.torch.ranks import RankedRunner, load_ranked  # noqa: E402
from helexa.neuron.harness.torch.step import Copy, Row, Step, StepFailed  # noqa: E402
from helexa.neuron.tp.leader import Group  # noqa: E402
from helexa.neuron.tp.pool import PoolFailed  # noqa: E402

GONE_S = 5.0
VOCABULARY = 7


@pytest.fixture(autouse=True)
def _ranks_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", OURS)


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


def wait_for(true: Callable[[], bool], within_s: float = GONE_S) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def specs(world: int, *troubles: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "world_size": world, "vocabulary": VOCABULARY, "troubles": list(troubles)}
        for rank in range(world)
    ]


class Owner:
    """Of a runner: what it is told."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.told = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.told.set()


@contextmanager
def ranked(
    folder: Path, world: int, *troubles: dict[str, Any], backend: str = "shm", owner: Owner | None = None
) -> Iterator[RankedRunner]:
    group = Group(backend, folder, tuple(range(world)), loader=toy_shard.LOADER)
    runner = load_ranked(specs(world, *troubles), group, progress=lambda _: None, on_failed=owner or Owner())
    pids = runner.pids
    try:
        yield runner
    finally:
        runner.close()
    assert gone(pids), "a rank was left behind"


def expected(world: int, *sums: int) -> list[list[float]]:
    return [[float(total * sum(range(1, world + 1)) + c) for c in range(VOCABULARY)] for total in sums]


@pytest.mark.parametrize(("world", "backend"), [(2, "shm"), (4, "shm"), (3, "gloo")])
def test_a_step_is_computed_by_all_ranks_and_answered_by_the_first(tmp_path: Path, world: int, backend: str) -> None:
    with ranked(tmp_path, world, backend=backend) as runner:
        first = runner.step(Step(rows=[Row(1, 0, [3, 4]), Row(2, 0, [5]), Row(3, 0, [9], wanted=0)]))
        assert first.tolist() == expected(world, 7, 5)
        second = runner.step(Step(rows=[Row(4, 2, [6])], drops=[2], copies=[Copy(1, 4, 2)]))
        assert second.tolist() == expected(world, 6)
        for token in range(50):
            assert runner.step(Step(rows=[Row(1, 2 + token, [token])])).tolist() == expected(world, token)
        assert all(mb > 20 for mb in runner.memory_mb())
        assert len(runner.pids) == world - 1


def test_the_keys_and_values_that_ranks_hold_are_dropped_and_cleared(tmp_path: Path) -> None:
    with ranked(tmp_path, 2) as runner:
        runner.step(Step(rows=[Row(1, 0, [3]), Row(2, 0, [3])]))
        runner._leader.clear()
        runner._leader.drop([1])  # not held any more: no error
        with pytest.raises(StepFailed, match="rank 1: internal: KeyError"):
            runner.step(Step(rows=[Row(3, 0, [1])], drops=[1]))


@pytest.mark.parametrize(
    ("backend", "rank", "do"),
    [
        ("shm", 0, "oom"),
        ("shm", 1, "raise"),
        ("shm", 2, "oom"),
        ("shm", 2, "die"),
        ("gloo", 0, "raise"),
        ("gloo", 1, "die"),
    ],
)
def test_a_rank_that_fails_in_a_step_ends_it_for_all_with_its_reason(
    tmp_path: Path, backend: str, rank: int, do: str
) -> None:
    reason = {"oom": "4 MiB wanted", "raise": "the device is on fire", "die": "SIGKILL"}[do]
    owner = Owner()
    with ranked(tmp_path, 3, {"rank": rank, "step": 1, "do": do}, backend=backend, owner=owner) as runner:
        pids = runner.pids
        runner.step(Step(rows=[Row(1, 0, [1])]))
        began = time.monotonic()
        with pytest.raises(StepFailed) as failed:
            runner.step(Step(rows=[Row(1, 1, [1])]))
        wait_for(lambda: gone(pids))
        assert time.monotonic() - began < GONE_S
        assert f"rank {rank}" in str(failed.value)
        assert reason in str(failed.value)
        assert owner.reasons == [str(failed.value)]
        with pytest.raises(StepFailed, match=f"rank {rank}"):
            runner.step(Step(rows=[Row(1, 2, [1])]))


def test_a_rank_that_dies_between_steps_is_told_at_once(tmp_path: Path) -> None:
    owner = Owner()
    with ranked(tmp_path, 2, owner=owner) as runner:
        pids = runner.pids
        runner.step(Step(rows=[Row(1, 0, [1])]))
        os.kill(pids[0], 9)
        assert owner.told.wait(GONE_S)
        assert "rank 1 ended (SIGKILL)" in owner.reasons[0]
        wait_for(lambda: gone(pids))
        with pytest.raises(StepFailed, match="rank 1 ended"):
            runner.step(Step(rows=[Row(1, 1, [1])]))


@pytest.mark.parametrize(
    ("do", "error", "reason"),
    [
        ("raise", PoolFailed, "rank 1: load: the device is on fire"),
        ("oom", MemoryError, "rank 1: device: out of memory: 4 MiB wanted"),
        ("die", PoolFailed, r"rank 1 ended \(SIGKILL\)"),
    ],
)
def test_a_rank_that_cannot_load_ends_the_load_with_its_reason(
    tmp_path: Path, do: str, error: type[Exception], reason: str
) -> None:
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(error, match=reason), ranked(tmp_path, 2, {"rank": 1, "step": "load", "do": do}):
        pass
    assert set(psutil.Process().children(recursive=True)) <= before


def test_what_a_rank_prints_in_a_step_is_no_frame(tmp_path: Path) -> None:
    with ranked(tmp_path, 2, {"rank": 1, "step": 0, "do": "print"}) as runner:
        assert runner.step(Step(rows=[Row(1, 0, [2])])).tolist() == expected(2, 2)
        assert runner.step(Step(rows=[Row(1, 1, [3])])).tolist() == expected(2, 3)


def test_a_rank_that_stands_still_is_killed_by_whoever_waits_no_longer(tmp_path: Path) -> None:
    owner = Owner()
    with ranked(tmp_path, 2, {"rank": 1, "step": 0, "do": "hang"}, owner=owner) as runner:
        pids = runner.pids
        failures: list[BaseException] = []

        def step() -> None:
            try:
                runner.step(Step(rows=[Row(1, 0, [1])]))
            except StepFailed as err:
                failures.append(err)

        stepping = threading.Thread(target=step)
        stepping.start()
        wait_for(lambda: psutil.Process(pids[0]).status() == psutil.STATUS_STOPPED)
        runner._leader.fail("it took too long")
        stepping.join(GONE_S)
        wait_for(lambda: gone(pids))
        assert [str(failure) for failure in failures] == ["it took too long"]
        assert owner.reasons == ["it took too long"]


LEADER = """
import sys, threading
from pathlib import Path
from tests.helpers import toy_shard
from helexa.neuron.harness.torch.ranks import load_ranked
from helexa.neuron.harness.torch.step import Row, Step
from helexa.neuron.tp.leader import Group
group = Group("shm", Path(sys.argv[1]), (0, 1, 2), loader=toy_shard.LOADER)
specs = [{"rank": rank, "world_size": 3, "vocabulary": 7} for rank in range(3)]
runner = load_ranked(specs, group, progress=lambda _: None, on_failed=print)
print(*runner.pids, flush=True)
n = 0
while True:
    runner.step(Step(rows=[Row(1, n, [1])]))
    n += 1
"""


def test_a_leader_that_is_killed_while_it_steps_leaves_no_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEADER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            pids = [int(word) for word in process.stdout.readline().split()]
            assert len(pids) == 2
        finally:
            process.kill()
    wait_for(lambda: gone(pids))
