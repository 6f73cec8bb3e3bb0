from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'helexa[torch]'")

from helexa.neuron.harness.torch.runners import backend_of


@pytest.mark.parametrize(
    ("devices", "place", "backend"),
    [
        (["cuda:0", "cuda:1"], "Linux x86_64", "nccl"),
        (["cpu"] * 2, "Linux x86_64", "shm"),
        (["cpu"] * 63, "Linux x86_64", "shm"),
        (["cpu"] * 64, "Linux x86_64", "gloo"),  # more counters than a page has room for
        (["cpu"] * 2, "Linux aarch64", "gloo"),  # stores may be seen out of order
        (["cpu"] * 2, "Darwin x86_64", "gloo"),
    ],
)
def test_ranks_sum_over_what_their_devices_and_machine_can(devices: list[str], place: str, backend: str) -> None:
    assert backend_of(devices, place) == backend
