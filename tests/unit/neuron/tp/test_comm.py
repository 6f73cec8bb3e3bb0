from __future__ import annotations

from pathlib import Path

import pytest

from helexa.neuron.tp import comm


def test_a_comm_id_is_hex_and_leads_back_to_its_backend_and_place() -> None:
    made = comm.Comm.new("shm", Path("/run/m"))
    assert int(made.id, 16)
    assert comm.read(made.id) == made
    assert made.store != comm.Comm.new("shm", Path("/run/m")).store, "a new place for each init"


@pytest.mark.parametrize("bad", ["", "zz", "00", b'{"backend":"tcp","store":"/x","nonce":""}'.hex(), b"{}".hex()])
def test_what_no_leader_wrote_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="comm_id"):
        comm.read(bad)
