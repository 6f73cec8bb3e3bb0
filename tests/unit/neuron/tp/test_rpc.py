"""The protocol between a leader and its ranks, as bytes."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.wires import split

from helexa.neuron.tp import rpc


@pytest.mark.parametrize(
    ("frame", "wire"),
    [
        (rpc.Ping(), {"op": "ping"}),
        (rpc.Init(comm_id="ab12"), {"op": "init", "comm_id": "ab12"}),
        (rpc.NcclSanityCheck(id=7), {"op": "nccl_sanity_check", "id": 7}),
        (rpc.LoadShard(spec={"folder": "/m"}), {"op": "load_shard", "spec": {"folder": "/m"}}),
        (rpc.Step(id=8, step=msgspec.Raw(b"[[[1,0,[5],1]]]")), {"op": "step", "id": 8, "step": [[[1, 0, [5], 1]]]}),
        (rpc.Drop(slabs=[3]), {"op": "drop", "slabs": [3]}),
        (rpc.Clear(), {"op": "clear"}),
        (rpc.QueryMemory(), {"op": "query_memory"}),
        (rpc.Unload(), {"op": "unload"}),
        (rpc.LoadShardOk(kv_bytes_per_token=8), {"op": "load_shard_ok", "kv_bytes_per_token": 8}),
        (rpc.StepOk(id=8), {"op": "step_ok", "id": 8}),
        (rpc.QueryMemoryOk(resident_mb=90), {"op": "query_memory_ok", "resident_mb": 90}),
        (rpc.UnloadOk(), {"op": "unload_ok"}),
        (rpc.Shutdown(), {"op": "shutdown"}),
        (
            rpc.Pong(id=1, rank=1, world_size=2, cuda_device=1),
            {"op": "pong", "id": 1, "rank": 1, "world_size": 2, "cuda_device": 1},
        ),
        (rpc.InitOk(), {"op": "init_ok"}),
        (rpc.NcclSanityResult(observed_sum=2), {"op": "nccl_sanity_result", "observed_sum": 2}),
        (rpc.Bye(), {"op": "bye"}),
        (
            rpc.Error(kind="unknown_op", message="..."),
            {"op": "error", "kind": "unknown_op", "message": "..."},
        ),
    ],
)
def test_a_frame_is_the_line_that_the_architecture_shows(frame: rpc.Request, wire: dict[str, object]) -> None:
    assert json.loads(rpc.line(frame)) == wire
    assert rpc.line(frame).endswith(b"}\n")


@pytest.mark.parametrize(
    ("line", "kind", "frame_id"),
    [
        (b'{"op":"dance","id":3}', "unknown_op", 3),
        (b'{"op":"init","id":4}', "bad_request", 4),
        (b'{"op":"init","comm_id":5,"id":4}', "bad_request", 4),
        (b'{"id":4}', "bad_request", None),
        (b"ping", "bad_request", None),
        (b"", "bad_request", None),
        (b'{"op":"\xff"}', "bad_request", None),
        (b"[" * 100_000, "bad_request", None),
    ],
)
def test_what_is_no_request_has_an_error_with_its_kind_and_the_id_where_it_could_be_read(
    line: bytes, kind: str, frame_id: int | None
) -> None:
    with pytest.raises(rpc.BadFrame) as caught:
        rpc.read_request(line)
    assert (caught.value.error.kind, caught.value.error.id) == (kind, frame_id)


def test_a_member_that_a_later_version_adds_is_no_error() -> None:
    assert isinstance(rpc.read_request(b'{"op":"ping","since":"2027"}'), rpc.Ping)


@given(
    lines=st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), max_size=8),
    half=st.binary(max_size=10).map(lambda b: b.replace(b"\n", b"")),
    cuts=st.lists(st.integers(0, 300), max_size=12),
)
def test_lines_come_out_whole_whatever_the_cuts_and_one_over_the_limit_comes_out_once_as_none(
    lines: list[bytes], half: bytes, cuts: list[int]
) -> None:
    reader = rpc.Lines(limit=12)
    out = []
    for piece in split(b"".join(line + b"\n" for line in lines) + half, cuts):
        out += reader.feed(piece)
    expected = [line if len(line) <= 12 else None for line in lines]
    if len(half) > 12:
        expected.append(None)
        assert reader.half == b""
    else:
        assert reader.half == half
    assert out == expected
