"""Answers that fail, as bytes: an upstream that dies or refuses, a client that leaves or reads slowly."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.lines import ASK, DONE, HEAD, ROLE, STOP, TEXTS, Line, chunked, delta, event
from tests.helpers.wires import CHAT, Recorder, client_of, dechunk, request, waiting_upstream

from helexa.core.errors import Overloaded, UpstreamError
from helexa.core.relay.contract import Exchange, Route
from helexa.core.relay.server import Server


@given(texts=TEXTS, at=st.integers(0, 3000), reads=st.integers(1, 200))
def test_an_upstream_that_dies_anywhere_is_told_in_an_event_or_by_a_cut_and_never_by_a_done(
    texts: list[str], at: int, reads: int
) -> None:
    raw = HEAD + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in [ROLE, *map(delta, texts), STOP, DONE]) + b"0\r\n\r\n"
    raw = raw[: 1 + at % (len(raw) - 1)]
    line = Line(cut_usage=True)
    line.hear(*[raw[i : i + reads] for i in range(0, len(raw), reads)])
    line.connection.connection_lost(None)
    assert line.director.open_routes == 0
    assert len(line.director.finished) == 1
    sent = line.wire.sent
    if line.wire.aborted:
        return
    if sent.startswith(b"HTTP/1.1 502"):
        assert b"data:" not in sent
        return
    blocks = [b for b in dechunk(sent).split(b"\n\n") if b]
    if blocks[-1] == b"data: [DONE]":
        assert raw.count(DONE) == 1, "all of it had come"
        return
    assert json.loads(blocks[-1][5:])["error"]["code"] == "upstream_error"
    assert b"data: [DONE]" not in blocks
    assert line.wire.closed


def test_an_upstream_that_dies_right_behind_a_done_that_was_read_with_half_an_event_lost_nothing() -> None:
    line = Line(cut_usage=True)
    chunks = [b"%x\r\n%b\r\n" % (len(e), e) for e in (ROLE, delta("0"), STOP, DONE)]
    line.hear(HEAD, *chunks[:2], chunks[2][:-9], chunks[2][-9:] + chunks[3])
    line.connection.connection_lost(None)
    assert line.wire.sent.endswith(DONE + b"\r\n0\r\n\r\n")
    assert b"error" not in line.wire.sent


def test_a_death_inside_a_half_sent_chunk_is_told_in_an_event_because_the_half_was_held_back() -> None:
    line = Line()
    line.hear(HEAD + b"%x\r\n%b\r\n" % (len(ROLE), ROLE) + b"%x\r\n%b\r\n" % (len(delta("a")), delta("a")))
    whole = b"%x\r\n%b\r\n" % (len(delta("b")), delta("b"))
    line.hear(whole, whole[:20])
    line.connection.connection_lost(ConnectionResetError("reset"))
    blocks = dechunk(line.wire.sent).split(b"\n\n")
    assert b"upstream_error" in blocks[-2], "the half event was held back, so an error event still fits"
    assert line.director.failures[0][1] is True


REFUSED = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n" + b'{"error":"x"}'


def test_an_upstreams_own_error_passes_as_it_came() -> None:
    line = Line()
    line.hear(REFUSED)
    assert line.wire.sent.startswith(b"HTTP/1.1 400 ")
    assert line.wire.sent.endswith(b'{"error":"x"}')
    assert line.director.finished[0].status == 400


def test_an_error_that_the_director_translates_is_what_the_client_gets() -> None:
    line = Line()
    line.director.on_refused = lambda status, body: Overloaded("beast is full; try again", retry_after_s=3)
    line.hear(REFUSED)
    assert line.wire.sent.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 3\r\n" in line.wire.sent


def test_a_failed_attempt_moves_to_another_upstream_and_the_client_never_knows() -> None:
    line = Line()
    second, connection, up = waiting_upstream("benjy")
    line.director.upstreams.append(second)
    line.director.on_refused = lambda status, body: UpstreamError("beast is ill")
    line.hear(REFUSED)
    assert up.sent.endswith(ASK)
    connection.data_received(HEAD + chunked(ROLE + delta("a") + STOP + DONE, [500]))
    assert line.body == ROLE + delta("a") + STOP + DONE
    (exchange,) = line.director.finished
    assert (exchange.node, exchange.tried, exchange.error) == ("benjy", ["beast"], None)
    assert line.director.open_routes == 0


def test_heartbeats_of_the_upstream_commit_to_nothing_so_a_later_failure_still_moves_on() -> None:
    line = Line()
    second, connection, _ = waiting_upstream("benjy")
    line.director.upstreams.append(second)
    line.hear(HEAD + b"3\r\n:\n\n\r\n")
    assert b":\n\n" in line.wire.sent
    line.connection.connection_lost(None)
    connection.data_received(HEAD + chunked(delta("a") + DONE, [500]))
    assert line.body == b":\n\n" + delta("a") + DONE


def test_an_error_after_heartbeats_arrives_as_an_event_and_the_stream_ends_without_a_done() -> None:
    line = Line()
    line.hear(HEAD + b"3\r\n:\n\n\r\n")
    line.connection.connection_lost(None)
    blocks = line.body.split(b"\n\n")
    assert json.loads(blocks[1][5:])["error"]["code"] == "upstream_error"
    assert line.wire.closed


def test_a_slow_reader_pauses_its_own_upstream_and_only_that() -> None:
    line = Line()
    other = Line()
    line.hear(HEAD + b"%x\r\n%b\r\n" % (len(delta("a")), delta("a")))
    line.client.pause_writing()
    assert line.up.reading_paused
    assert not other.up.reading_paused
    line.client.resume_writing()
    assert not line.up.reading_paused


def test_a_connection_whose_last_read_filled_its_client_is_kept_for_the_next_request_with_open_ears() -> None:
    line = Line(b'{"model":"qwen"}')
    line.client.pause_writing()
    line.hear(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    assert not line.up.reading_paused
    line.client.data_received(request(b'{"model":"qwen"}'))
    assert line.up.reading_paused, "the next answer waits for the same slow reader"
    line.client.resume_writing()
    assert not line.up.reading_paused


def test_an_answer_that_is_cut_half_way_is_never_mixed_with_an_error_event() -> None:
    line = Line(b'{"model":"qwen"}')
    line.hear(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{")
    assert line.client.pair is not None
    line.client.pair.fail(Overloaded("a drain ran out"))
    assert line.wire.sent.endswith(b"\r\n\r\n{")
    assert line.wire.aborted
    assert line.up.aborted
    assert line.director.open_routes == 0


def test_a_client_that_leaves_ends_its_upstream_at_once() -> None:
    for heard in (b"", HEAD, HEAD + b"%x\r\n%b\r\n" % (len(delta("a")), delta("a"))):
        line = Line()
        line.hear(heard)
        line.client.connection_lost(None)
        assert line.up.aborted
        assert line.director.open_routes == 0
        assert line.director.finished[0].client_gone
        assert line.server.inflight == 0
        assert not line.server.connections


ERROR = event(error={"message": "host died", "code": "upstream_error"})


def test_an_error_event_that_comes_first_moves_to_another_upstream_as_an_error_answer_would() -> None:
    line = Line()
    second, connection, _ = waiting_upstream("benjy")
    line.director.upstreams.append(second)
    line.director.on_refused = lambda status, body: UpstreamError("beast is ill") if b"host died" in body else None
    line.hear(HEAD + chunked(b":\n\n" + ERROR, [400]))
    connection.data_received(HEAD + chunked(delta("a") + DONE, [500]))
    assert line.body == delta("a") + DONE
    assert line.director.finished[0].error is None


def test_an_error_event_after_the_first_delta_passes_and_is_counted_as_the_error_it_is() -> None:
    line = Line()
    line.director.on_refused = lambda status, body: UpstreamError("beast is ill")
    line.hear(HEAD + chunked(delta("a"), [400])[:-5], chunked(delta("b"), [400])[:-5], chunked(ERROR, [400]))
    assert line.body == delta("a") + delta("b") + ERROR
    assert line.director.finished[0].error is not None


def test_a_fault_of_the_director_s_own_is_told_and_leaves_nothing_behind() -> None:
    class Faulty(Recorder):
        def route(self, exchange: Exchange) -> Route:
            raise KeyError("lost")

    upstream, _, _ = waiting_upstream()
    director = Faulty(upstream)
    server = Server(director=director, endpoints=[CHAT])
    client, wire = client_of(server)
    client.data_received(request(ASK))
    assert wire.sent.startswith(b"HTTP/1.1 500 ")
    assert b"KeyError" in wire.sent
    assert (len(director.finished), server.inflight) == (1, 0)
