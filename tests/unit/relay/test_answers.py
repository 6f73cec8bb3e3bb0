"""Answers as bytes: whatever the cuts of the upstream's reads and chunks, the client gets the same events."""

from __future__ import annotations

import json
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.lines import ASK, ASK_USAGE, DONE, FIRST, HEAD, ROLE, STOP, TEXTS, USAGE, Line, chunked, delta, event
from tests.helpers.wires import CHAT, Recorder, Wire, client_of, dechunk, request, split, waiting_upstream

from helexa.core.errors import Dialect, Overloaded
from helexa.core.relay import connection
from helexa.core.relay.contract import Endpoint, Reply, Usage
from helexa.core.relay.server import Server


@given(
    texts=TEXTS,
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    cuts=st.lists(st.integers(0, 4000), max_size=30),
    asked=st.booleans(),
    role=st.booleans(),
    per_event=st.booleans(),
)
def test_a_stream_arrives_whole_without_the_usage_that_nobody_asked_for(
    texts: list[str], sizes: list[int], cuts: list[int], asked: bool, role: bool, per_event: bool
) -> None:
    deltas = [delta(t) for t in texts]
    events = [*([ROLE] if role else []), b": beat\n\n", *deltas, STOP, USAGE, DONE]
    raw = HEAD + (
        b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in events) + b"0\r\n\r\n"
        if per_event
        else chunked(b"".join(events), sizes)
    )
    line = Line(ASK_USAGE if asked else ASK, cut_usage=True, first_event=True)
    line.hear(*split(raw, cuts))
    got = line.body
    if not role:
        at = got.index(b"data:")
        first, _, rest = got[at:].partition(b"\n\n")
        assert json.loads(first[5:])["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        got = got[:at] + rest
    expected = [*([ROLE] if role else []), *deltas, STOP, *([USAGE] if asked else []), DONE]
    assert got.replace(b": beat\n\n", b"", 1) == b"".join(expected)
    (exchange,) = line.director.finished
    assert exchange.usage == Usage(7, 3, 0)
    assert exchange.finish_reason == "stop"
    assert (exchange.t_first_token > 0) is any(texts)
    assert line.director.open_routes == 0
    assert line.connection.pool.try_take() is line.connection, "kept for the next request"
    assert not line.wire.closed


TIMED_USAGE = event(id="c1", choices=[], usage={"prompt_tokens": 7}, timings={"predicted_n": 3, "predicted_ms": 0.5})


@given(texts=TEXTS, cuts=st.lists(st.integers(0, 4000), max_size=8), one_write=st.booleans())
def test_the_timings_of_a_usage_that_is_cut_stand_in_the_event_before_as_without_it(
    texts: list[str], cuts: list[int], one_write: bool
) -> None:
    """The engine writes both at once."""
    events = [*map(delta, texts), STOP + TIMED_USAGE, DONE]
    line = Line(cut_usage=True)
    raw = HEAD + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in events) + b"0\r\n\r\n"
    line.hear(*([raw] if one_write else split(raw, cuts)))
    *before, stop, done = line.body.split(b"\n\n")[:-1]
    assert [block + b"\n\n" for block in before] == [delta(text) for text in texts]
    told = json.loads(stop[5:])
    assert told.pop("timings") == {"predicted_n": 3, "predicted_ms": 0.5}
    assert told == json.loads(STOP[5:])
    assert done + b"\n\n" == DONE
    (exchange,) = line.director.finished
    assert (exchange.usage, exchange.timings) == (Usage(7, 0, 0), {"predicted_n": 3, "predicted_ms": 0.5})


@given(texts=TEXTS, cuts=st.lists(st.integers(0, 4000), max_size=8), asked=st.booleans(), told=st.booleans())
def test_a_node_says_that_no_stop_string_ended_it_wherever_the_reads_were_cut(
    texts: list[str], cuts: list[int], asked: bool, told: bool
) -> None:
    choice = {"index": 0, "delta": {}, "finish_reason": "stop", **({"stop_reason": "END"} if told else {})}
    stop = event(id="c1", choices=[choice])
    events = [*map(delta, texts), stop + (USAGE if asked else b""), DONE]
    line = Line(ASK_USAGE if asked else ASK, stop_reason=True)
    line.hear(*split(HEAD + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in events) + b"0\r\n\r\n", cuts))
    blocks = [block + b"\n\n" for block in line.body.split(b"\n\n")[:-1]]
    assert blocks[: len(texts)] == [delta(text) for text in texts]
    (ended,) = json.loads(blocks[len(texts)][5:])["choices"]
    assert ended == {**choice, "stop_reason": "END" if told else None}
    assert blocks[len(texts) + 1 :] == [*([USAGE] if asked else []), DONE]


def test_a_read_in_the_middle_of_a_stream_is_passed_in_one_write_as_it_came() -> None:
    line = Line(cut_usage=True)
    line.hear(HEAD + b"%x\r\n%b\r\n" % (len(delta("a")), delta("a")))
    read = b"".join(b"%X\r\n%b\r\n" % (len(delta(t)), delta(t)) for t in "bc")
    before = len(line.wire.sent)
    line.hear(read)
    assert line.wire.sent[before:] == read


@given(
    texts=TEXTS,
    at=st.integers(0, 4000),
    byte=st.integers(0, 255),
    insert=st.booleans(),
    cuts=st.lists(st.integers(0, 4000), max_size=6),
)
def test_a_whole_chunk_known_by_its_size_line_is_taken_just_as_the_parser_would_take_it(
    texts: list[str], at: int, byte: int, insert: bool, cuts: list[int]
) -> None:
    reads = [b"%x\r\n%b\r\n" % (len(e), e) for e in (*map(delta, texts), STOP)]
    hurt = at % len(reads)
    where = at % len(reads[hurt])
    reads[hurt] = reads[hurt][:where] + bytes([byte]) + reads[hurt][where + (not insert) :]
    told = []
    for sizes in (connection._SIZE_LINES, {}):
        with patch.object(connection, "_SIZE_LINES", sizes):
            line = Line(cut_usage=True)
            line.hear(HEAD, b"%x\r\n%b\r\n" % (len(FIRST), FIRST))
            for piece in [*reads[:hurt], *split(reads[hurt], cuts), *reads[hurt + 1 :], b"0\r\n\r\n"]:
                if not line.connection.closed and line.connection.owner is not None:
                    line.hear(piece)
            told.append(
                (
                    line.wire.sent.partition(b"\r\n\r\n")[2],
                    [str(e) for e, _ in line.director.failures],
                    line.client.keep,
                )
            )
    assert told[0] == told[1]


def test_only_listed_headers_of_the_upstream_reach_the_client() -> None:
    line = Line(b'{"model":"qwen"}')
    line.hear(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nServer: llama.cpp\r\n"
        b"Set-Cookie: a=b\r\nKeep-Alive: timeout=5\r\nAccess-Control-Allow-Origin: *\r\n"
        b"X-Helexa-Dropped: tools\r\n\r\n{}"
    )
    head = line.wire.sent.partition(b"\r\n\r\n")[0].lower()
    names = sorted(row.partition(b":")[0] for row in head.split(b"\r\n")[1:])
    assert names == [b"content-length", b"content-type", b"date", b"x-helexa-dropped", b"x-request-id"]


def test_a_whole_answer_keeps_every_byte_and_its_usage_is_counted() -> None:
    choice = b'{"message":{"content":"0.7"},"finish_reason":"stop"}'
    body = b'{"choices":[' + choice + b'],"usage":{"prompt_tokens":2,"completion_tokens":1}}'
    line = Line(b'{"model":"qwen"}')
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    line.hear(raw[:60], raw[60:150], raw[150:])
    assert line.wire.sent.endswith(b"\r\n\r\n" + body)
    assert line.director.finished[0].usage == Usage(2, 1, 0)
    assert line.director.finished[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_an_http_1_0_client_gets_no_chunks_and_the_end_of_the_connection(stream: bool) -> None:
    line = Line(ASK if stream else b'{"model":"qwen"}', version=b"HTTP/1.0")
    if stream:
        line.hear(HEAD + chunked(ROLE + delta("a") + DONE, [9]))
        assert line.wire.sent.endswith(b"\r\n\r\n" + ROLE + delta("a") + DONE)
    else:
        line.hear(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            + chunked(b"{}", [1])
        )
        assert line.wire.sent.endswith(b"\r\n\r\n{}")
        assert b"content-length: 2\r\n" in line.wire.sent
    assert b"transfer-encoding" not in line.wire.sent.lower()
    assert line.wire.closed


def test_bytes_after_the_end_of_a_response_close_the_connection_and_are_never_the_next_answer() -> None:
    line = Line(b'{"model":"qwen"}')
    line.hear(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    line.hear(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
    assert line.up.aborted
    assert b"forged" not in line.wire.sent


def test_an_interim_answer_is_skipped() -> None:
    line = Line(b'{"model":"qwen"}')
    line.hear(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    assert line.wire.sent.startswith(b"HTTP/1.1 200 ")
    assert line.wire.sent.endswith(b"{}")


def test_a_mend_changes_the_decoded_body_and_the_framing_follows() -> None:
    class Upper:
        def __init__(self) -> None:
            self.held = b""

        def feed(self, data: bytes) -> bytes:
            out, self.held = self.held, data
            return out.upper()

        def finish(self) -> bytes:
            return self.held.upper()

    line = Line(b'{"model":"qwen"}', mend=Upper())
    line.hear(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunked(b'{"a":"b"}', [3])
    )
    assert line.wire.sent.endswith(b"content-length: 9\r\n" + line.wire.sent.partition(b"content-length: 9\r\n")[2])
    assert line.wire.sent.endswith(b'\r\n\r\n{"A":"B"}')
    streamed = Line(mend=Upper())
    streamed.hear(HEAD + chunked(delta("a") + DONE, [7]))
    assert streamed.body == (delta("a") + DONE).upper()


PROGRESS = event(choices=[{"index": 0, "delta": {"role": "assistant"}}], prompt_progress={"total": 9, "processed": 4})


@pytest.mark.parametrize("cut", [True, False])
def test_progress_of_the_prefill_is_for_those_who_asked_and_the_role_comes_first_all_the_same(cut: bool) -> None:
    line = Line(cut_progress=cut, first_event=True)
    line.hear(HEAD + chunked(PROGRESS + PROGRESS + delta("a") + DONE, [100]))
    assert line.body.count(b"prompt_progress") == (0 if cut else 2)
    assert line.body.count(b'"role":"assistant"') == (1 if cut else 2)
    assert line.body.index(b'"role"') < line.body.index(b'"content":"a"')
    assert line.director.finished[0].t_first_token > 0


class Collector:
    """Makes one JSON body of a stream, as a harness does whose engine can only be cancelled while it streams."""

    def __init__(self, error: Overloaded | None = None) -> None:
        self.got, self.error = b"", error

    def feed(self, data: bytes) -> bytes:
        self.got += data
        return b""

    def finish(self) -> bytes:
        if self.error is not None:
            raise self.error
        return b'{"events":%d,"usage":{"prompt_tokens":5}}' % self.got.count(b"data:")


def test_a_stream_collected_by_a_mend_is_one_json_answer_to_the_client() -> None:
    line = Line(b'{"model":"qwen"}', mend=Collector(), content_type=b"application/json")
    line.hear(HEAD + chunked(delta("a") + delta("b") + DONE, [11]))
    head, _, body = line.wire.sent.partition(b"\r\n\r\n")
    assert json.loads(body)["events"] == 3
    assert b"content-type: application/json\r\n" in head
    assert b"event-stream" not in head
    assert b"content-length: %d" % len(body) in head
    assert line.director.finished[0].usage == Usage(5, 0, 0)


@pytest.mark.parametrize("body", [ASK, b'{"model":"qwen"}'])
def test_a_mend_that_finds_an_error_fails_the_attempt(body: bytes) -> None:
    line = Line(body, mend=Collector(Overloaded("no slot")), content_type=b"application/json")
    line.hear(HEAD + chunked(delta("a"), [11]))
    assert line.wire.sent.startswith(b"HTTP/1.1 503 ")
    assert line.up.aborted
    assert line.director.open_routes == 0


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
@pytest.mark.parametrize("body", [ASK, b'{"model":"qwen"}'])
def test_an_answer_that_no_upstream_has_to_give_is_whole_and_nobody_is_asked(body: bytes, version: bytes) -> None:
    upstream, _, up = waiting_upstream()
    director = Recorder(upstream)
    director.on_route = lambda exchange: Reply(b'{"done":true}')
    client, wire = client_of(Server(director=director, endpoints=[CHAT]))
    client.data_received(request(body).replace(b"HTTP/1.1", version, 1))
    head, _, said = wire.sent.rpartition(b"\r\n\r\n")
    assert said == b'{"done":true}'
    assert head.count(b"HTTP/1.1 200") == 1
    assert b"content-length: 13" in head
    assert up.sent == b""
    assert [exchange.status for exchange in director.finished] == [200]


def test_an_upstream_is_asked_at_the_path_that_the_route_names() -> None:
    line = Line(path="/v1/completions")
    assert line.up.sent.startswith(b"POST /v1/completions HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("body", "streams"), [(b'{"model":"m"}', True), (b'{"model":"m","stream":false}', False), (ASK, True)]
)
def test_an_endpoint_may_stream_to_those_who_do_not_say_what_they_want(body: bytes, streams: bool) -> None:
    upstream, _, _ = waiting_upstream()
    director = Recorder(upstream)
    client, _ = client_of(Server(director=director, endpoints=[Endpoint("/x", Dialect.OLLAMA, "/y", streams=True)]))
    client.data_received(request(body, path=b"/x"))
    assert [exchange.stream for exchange in director.exchanges] == [streams]


def test_the_wire_helper_itself_refuses_a_broken_frame() -> None:
    with pytest.raises((AssertionError, ValueError)):
        dechunk(b"HTTP/1.1 200 OK\r\n\r\n5\r\nabc\r\n0\r\n\r\n")
    assert Wire().sent == b""
