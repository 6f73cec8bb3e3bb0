"""What is written is held while a turn of the loop reads, and nothing of it is lost, late or out of order."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.lines import DONE, FIRST, HEAD, STOP, USAGE, Line, chunked, delta
from tests.helpers.wires import Turn, client_of

from helexa.core.errors import ShuttingDown
from helexa.core.relay.outbox import FEW, LARGE, LET_BY, MOST, VAIN, Outbox
from helexa.core.relay.server import Server


class Receiver:
    """One end of a connection, and what it got."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.write = self.got.append


def framed(*events: bytes) -> list[bytes]:
    return [b"%x\r\n%b\r\n" % (len(e), e) for e in events]


STEPS = st.lists(
    st.tuples(st.sampled_from(["put"] * 6 + ["turn", "flush", "drop"]), st.integers(0, 3), st.integers(1, 40)),
    max_size=60,
)


@given(STEPS)
def test_everybody_gets_his_bytes_in_order_and_by_the_end_of_the_turn(
    steps: list[tuple[str, int, int]],
) -> None:
    turn = Turn()
    outbox = Outbox(turn.call_soon)
    receivers = [Receiver() for _ in range(4)]
    due: defaultdict[int, list[bytes]] = defaultdict(list)
    for n, (what, which, count) in enumerate(steps):
        receiver = receivers[which]
        if what == "put":
            for k in range(count):
                data = b"%d.%d" % (n, k)
                due[which].append(data)
                outbox.put(receiver.write, data)
                assert len(outbox.held) <= MOST
        elif what == "turn":
            turn.end()
        elif what == "flush":
            outbox.flush()
        else:
            outbox.drop(receiver.write)
            due[which] = list(receiver.got)
        if what in ("turn", "flush"):
            assert not outbox.held
            assert all(receivers[i].got == due[i] for i in range(4))
        assert all(receivers[i].got == due[i][: len(receivers[i].got)] for i in range(4))
    turn.end()
    assert all(receivers[i].got == due[i] for i in range(4))


def test_reads_that_come_alone_are_written_at_once_until_there_may_be_company_again() -> None:
    turn, receiver = Turn(), Receiver()
    outbox = Outbox(turn.call_soon)
    for _ in range(VAIN):
        outbox.put(receiver.write, b"x")
        assert outbox.held
        turn.end()
    for n in range(LET_BY):
        outbox.put(receiver.write, b"x")
        assert len(receiver.got) == VAIN + n + 1
    outbox.put(receiver.write, b"x")
    assert len(outbox.held) == 1


def test_a_turn_with_company_keeps_the_next_ones_held() -> None:
    turn, receiver = Turn(), Receiver()
    outbox = Outbox(turn.call_soon)
    for n in range(4 * VAIN):
        for _ in range(FEW if n % (VAIN - 1) == 0 else 1):
            outbox.put(receiver.write, b"x")
        assert outbox.held
        turn.end()


def test_what_is_large_is_written_at_once_and_behind_what_was_held() -> None:
    turn, receiver = Turn(), Receiver()
    outbox = Outbox(turn.call_soon)
    for data in (b"small", b"x" * (LARGE + 1)):
        outbox.put(receiver.write, data)
    assert [len(data) for data in receiver.got] == [5, LARGE + 1]
    assert not outbox.held


def test_a_client_that_cannot_be_written_to_costs_the_others_nothing() -> None:
    def broken(_data: bytes) -> None:
        raise RuntimeError("closed")

    turn, before, after = Turn(), Receiver(), Receiver()
    outbox = Outbox(turn.call_soon)
    for write in (before.write, broken, after.write):
        outbox.put(write, b"x")
    with pytest.raises(RuntimeError):
        turn.end()
    assert before.got == after.got == [b"x"]
    outbox.put(before.write, b"y")
    turn.end()
    assert before.got == [b"x", b"y"]


# through the relay

TEXT = st.text(alphabet='ab"\\:{}0', max_size=12) | st.just('"usage":{"x":1}')


@given(
    texts=st.lists(TEXT, min_size=1, max_size=12),
    ends=st.lists(st.booleans(), min_size=20, max_size=20),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4) | st.none(),
    cut=st.booleans(),
)
def test_a_stream_is_the_same_whichever_of_its_reads_share_a_turn(
    texts: list[str], ends: list[bool], sizes: list[int] | None, cut: bool
) -> None:
    events = [FIRST, *map(delta, texts), STOP, USAGE, DONE]
    pieces = framed(*events) if sizes is None else [chunked(b"".join(events), sizes)[:-5]]
    turn = Turn()
    held, plain = Line(turn=turn, cut_usage=cut), Line(cut_usage=cut)
    for line in (held, plain):
        line.hear(HEAD)
        for n, piece in enumerate([*pieces, b"0\r\n\r\n"]):
            line.hear(piece)
            if line is held and ends[n]:
                turn.end()
    turn.end()
    assert held.body == plain.body
    assert held.up.sent.partition(b"\r\n\r\n")[2] == plain.up.sent.partition(b"\r\n\r\n")[2]
    (one,), (other,) = held.director.finished, plain.director.finished
    assert (one.usage, one.finish_reason, one.reads) == (other.usage, other.finish_reason, other.reads)


def passing(turn: Turn) -> Line:
    """A stream of which one event is held."""
    line = Line(turn=turn)
    line.hear(HEAD, *framed(FIRST))
    turn.end()
    assert line.connection.passing
    seen = line.wire.sent
    line.hear(*framed(delta("held")))
    assert line.wire.sent == seen
    return line


@pytest.mark.parametrize("end", ["lost", "broken", "drain"])
def test_what_is_held_goes_before_the_error_that_ends_the_stream(end: str) -> None:
    turn = Turn()
    line = passing(turn)
    if end == "lost":
        line.connection.connection_lost(None)
    elif end == "broken":
        line.hear(b"no size\r\n")
    else:
        assert line.client.pair is not None
        line.client.pair.fail(ShuttingDown("now"))
    assert line.wire.closed
    assert 0 < line.wire.sent.index(b"held") < line.wire.sent.index(b'"error"')
    sent = line.wire.sent
    turn.end()
    assert line.wire.sent == sent


def test_what_was_written_before_a_connection_is_cut_leaves_before_the_cut() -> None:
    line = passing(Turn())
    line.client.abort()
    assert line.wire.aborted
    assert b"held" in line.wire.sent


def test_nothing_is_written_for_a_client_that_left() -> None:
    turn = Turn()
    line = passing(turn)
    sent = line.wire.sent
    line.wire.closed = True
    line.client.connection_lost(None)
    turn.end()
    assert line.wire.sent == sent
    assert line.up.aborted


def test_a_node_is_not_asked_for_a_client_that_left_in_the_same_turn() -> None:
    turn = Turn()
    line = Line(turn=turn)
    assert not line.up.sent
    line.client.connection_lost(None)
    turn.end()
    assert not line.up.sent
    assert line.up.aborted


def test_a_request_whose_kept_connection_closed_in_the_same_turn_is_not_written_to_it() -> None:
    async def run() -> None:
        turn = Turn()
        line = Line(turn=turn)
        line.up.closed = True
        line.connection.connection_lost(None)
        turn.end()
        assert not line.up.sent
        assert not line.director.failures, "a connection of ours that was closed is no fault of the node's"
        line.client.connection_lost(None)

    asyncio.run(run())


def test_a_refused_head_is_answered_before_the_end_is_told() -> None:
    turn = Turn()
    client, wire = client_of(Server(director=None), turn)
    client.data_received(b"GET / HTTP/1.1\r\n\r\n")
    assert wire.sent.startswith(b"HTTP/1.1 400")
    assert wire.eof


def test_a_client_that_reads_slowly_pauses_its_upstream_when_the_turn_ends() -> None:
    turn = Turn()
    line = passing(turn)
    write = line.connection.write
    assert write is not None

    def full(data: bytes) -> None:
        write(data)
        line.client.pause_writing()

    line.server.outbox.held[:] = [(full, data) for _, data in line.server.outbox.held]
    turn.end()
    assert b"held" in line.wire.sent
    assert line.up.reading_paused
