"""The shared mapping's sums, against the plain ones, with ranks as threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'helexa[torch]'")

from helexa.neuron.tp.collective import CollectiveFailed  # noqa: E402
from helexa.neuron.tp.collective_shm import ShmCollective  # noqa: E402
from helexa.neuron.tp.comm import Comm  # noqa: E402


def together(folder: Path, world: int, do: Callable[[ShmCollective], Any], buffer: int = 4096) -> list[Any]:
    made = Comm.new("shm", folder)

    def one(rank: int) -> Any:
        group = ShmCollective(made, rank, world, timeout_s=20, buffer=buffer)
        try:
            return do(group)
        finally:
            group.close()

    with ThreadPoolExecutor(world) as threads:
        return [future.result() for future in [threads.submit(one, rank) for rank in range(world)]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_every_rank_has_the_same_sum_of_tensors_shorter_and_longer_than_a_buffer(
    tmp_path: Path, world: int, dtype: Any
) -> None:
    sizes = [1, 7, 576, 1024, 1025, 5000]

    def part(rank: int, size: int) -> Any:
        return (torch.arange(size) % 13 + rank).to(dtype)

    def do(group: ShmCollective) -> list[Any]:
        out = []
        for size in sizes:
            tensor = part(group.rank, size)
            group.all_reduce(tensor)
            out.append(tensor)
        return out

    results = together(tmp_path, world, do)
    for at, size in enumerate(sizes):
        expected = sum((part(rank, size) for rank in range(1, world)), part(0, size))
        for result in results:
            assert torch.equal(result[at], expected)


def test_a_gather_takes_parts_of_unequal_width_in_pieces(tmp_path: Path) -> None:
    def do(group: ShmCollective) -> Any:
        width = [3000, 0, 777][group.rank]
        return group.gather(torch.full((2, width), float(group.rank)))

    first, *others = together(tmp_path, 3, do)
    assert others == [None, None]
    assert [tuple(part.shape) for part in first] == [(2, 3000), (2, 0), (2, 777)]
    assert [set(part.view(-1).tolist()) for part in first] == [{0.0}, set(), {2.0}]


def test_many_turns_in_a_row_never_read_a_buffer_that_is_being_written(tmp_path: Path) -> None:
    def do(group: ShmCollective) -> bool:
        for turn in range(300):
            tensor = torch.full((64,), float(turn * (group.rank + 1)))
            group.all_reduce(tensor)
            if not bool((tensor == turn * 6).all()):
                return False
        return True

    assert together(tmp_path, 3, do) == [True] * 3


def test_a_group_that_is_ended_fails_for_whoever_waits(tmp_path: Path) -> None:
    inside = Event()

    def do(group: ShmCollective) -> str:
        if group.rank == 1:
            inside.wait(20)
            group.abort()
            return "ended"
        inside.set()
        try:
            group.barrier()
        except CollectiveFailed as err:
            return str(err)
        return "met"

    first, second = together(tmp_path, 2, do)
    assert "rank 0" in first
    assert second == "ended"


def test_a_leader_that_never_comes_is_told(tmp_path: Path) -> None:
    with pytest.raises(CollectiveFailed, match="the leader did not come"):
        ShmCollective(Comm.new("shm", tmp_path), 1, 2, timeout_s=0.05)
