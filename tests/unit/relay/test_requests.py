"""Requests as bytes: any cut of a good one gives the same exchange, and no ambiguous one ever becomes an exchange."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.wires import CHAT, Recorder, client_of, request, split, waiting_upstream

from helexa.core.config import Limits
from helexa.core.relay.server import Server

BODY = b'{"model":"qwen","stream":true,"messages":[{"role":"user","content":"0.7 \\u00e9"}]}'


@given(
    cuts=st.lists(st.integers(0, 500), max_size=12),
    chunked=st.booleans(),
    sizes=st.lists(st.integers(1, 60), min_size=1),
)
def test_a_request_arrives_the_same_wherever_it_was_cut(cuts: list[int], chunked: bool, sizes: list[int]) -> None:
    raw = request(BODY)
    if chunked:
        pieces, at = [], 0
        for size in [*sizes, len(BODY)]:
            if piece := BODY[at : at + size]:
                pieces.append(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece))
            at += size
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw = head + b"".join(pieces) + b"0\r\nX-Trailer: 1\r\n\r\n"
    upstream, _, up = waiting_upstream()
    director = Recorder(upstream)
    client, _ = client_of(Server(director=director, endpoints=[CHAT]))
    for piece in split(raw, cuts):
        client.data_received(piece)
    (exchange,) = director.exchanges
    assert (exchange.model, exchange.stream, exchange.body) == ("qwen", True, BODY)
    head, _, body = up.sent.partition(b"\r\n\r\n")
    assert body == BODY
    assert head.lower().count(b"content-length: %d" % len(BODY)) == 1
    assert b"transfer-encoding" not in head.lower()
    assert b"trailer" not in head.lower()


def with_lines(*lines: bytes, body: bytes = BODY, version: bytes = b"HTTP/1.1") -> bytes:
    return b"\r\n".join([b"POST /v1/chat/completions " + version, *lines]) + b"\r\n\r\n" + body


LENGTH = b"Content-Length: %d" % len(BODY)
AMBIGUOUS: dict[str, tuple[bytes, int]] = {
    "content-length with transfer-encoding": (with_lines(b"Host: g", LENGTH, b"Transfer-Encoding: chunked"), 400),
    "transfer-encoding with content-length": (with_lines(b"Host: g", b"Transfer-Encoding: chunked", LENGTH), 400),
    "two content-lengths": (with_lines(b"Host: g", LENGTH, b"Content-Length: 1"), 400),
    "two equal content-lengths": (with_lines(b"Host: g", LENGTH, LENGTH), 400),
    "a list of content-lengths": (with_lines(b"Host: g", b"Content-Length: 4, 4"), 400),
    "a signed content-length": (with_lines(b"Host: g", b"Content-Length: +4"), 400),
    "an empty content-length": (with_lines(b"Host: g", b"Content-Length:"), 400),
    "a folded header": (with_lines(b"Host: g", b"X-A: 1\r\n folded", LENGTH), 400),
    "a folded transfer-encoding": (with_lines(b"Host: g", b"Transfer-Encoding:\r\n chunked"), 400),
    "a bare LF after a header": (with_lines(b"Host: g\nX: y", LENGTH), 400),
    "a bare CR in a value": (with_lines(b"Host: g", b"X-A: 1\rTransfer-Encoding: chunked", LENGTH), 400),
    "a NUL": (with_lines(b"Host: g", b"X-A: \x00", LENGTH), 400),
    "a space before the colon": (with_lines(b"Host: g", b"Content-Length : 4"), 400),
    "a header without a name": (with_lines(b"Host: g", b": x", LENGTH), 400),
    "encodings before chunked": (with_lines(b"Host: g", b"Transfer-Encoding: gzip, chunked"), 400),
    "chunked twice": (with_lines(b"Host: g", b"Transfer-Encoding: chunked, chunked"), 400),
    "two transfer-encodings": (
        with_lines(b"Host: g", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
        400,
    ),
    "an unknown encoding": (with_lines(b"Host: g", b"Transfer-Encoding: identity"), 400),
    "transfer-encoding in 1.0": (with_lines(b"Host: g", b"Transfer-Encoding: chunked", version=b"HTTP/1.0"), 505),
    "a bad chunk size": (with_lines(b"Host: g", b"Transfer-Encoding: chunked", body=b"zz\r\nab\r\n0\r\n\r\n"), 400),
    "a chunk longer than its size": (
        with_lines(b"Host: g", b"Transfer-Encoding: chunked", body=b"1\r\nab\r\n0\r\n\r\n"),
        400,
    ),
    "a negative chunk size": (
        with_lines(b"Host: g", b"Transfer-Encoding: chunked", body=b"-1\r\nab\r\n0\r\n\r\n"),
        400,
    ),
    "a chunk size over 64 bits": (with_lines(b"Host: g", b"Transfer-Encoding: chunked", body=b"f" * 17 + b"\r\n"), 400),
    "no host": (with_lines(LENGTH), 400),
    "two hosts": (with_lines(b"Host: a", b"Host: b", LENGTH), 400),
    "HTTP/0.9": (b"GET /v1/models\r\n\r\n", 505),
    "HTTP/2 without being asked": (with_lines(b"Host: g", LENGTH, version=b"HTTP/2.0"), 505),
    "an unknown method": (b"BREW /pot HTTP/1.1\r\nHost: g\r\n\r\n", 400),
    "an upgrade": (with_lines(b"Host: g", b"Connection: upgrade", b"Upgrade: websocket", LENGTH), 400),
    "CONNECT": (b"CONNECT evil:80 HTTP/1.1\r\nHost: g\r\n\r\n", 400),
    "a compressed body": (with_lines(b"Host: g", b"Content-Encoding: gzip", LENGTH), 415),
    "an expectation we do not know": (with_lines(b"Host: g", b"Expect: dinner", LENGTH), 400),
    "a head of over 32 kB": (with_lines(b"Host: g", b"X-A: " + b"a" * 40_000, LENGTH), 431),
    "a head without an end": (b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nX-A: " + b"a" * 40_000, 431),
    "over a hundred headers": (with_lines(b"Host: g", *[b"X-%d: 1" % i for i in range(101)], LENGTH), 431),
    "no HTTP at all": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
}


@pytest.mark.parametrize("pieces", [1, 7], ids=["at once", "in pieces"])
@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_request_is_refused_and_nothing_of_it_goes_upstream(name: str, pieces: int) -> None:
    raw, status = AMBIGUOUS[name]
    upstream, _, up = waiting_upstream()
    director = Recorder(upstream)
    client, wire = client_of(Server(director=director, endpoints=[CHAT]))
    for piece in split(raw, [len(raw) * i // pieces for i in range(pieces)]):
        client.data_received(piece)
    assert director.exchanges == []
    assert up.sent == b""
    assert wire.sent.startswith(b"HTTP/1.1 %d " % status), wire.sent[:80]
    head, _, body = wire.sent.partition(b"\r\n\r\n")
    assert json.loads(body)["error"]["message"]
    assert b"connection: close" in head
    assert wire.sent.count(b"\r\ndate: ") == 1, "answered once"


def test_a_pipelined_request_is_never_served_and_the_connection_ends_after_the_first_answer() -> None:
    upstream, connection, up = waiting_upstream()
    director = Recorder(upstream)
    client, wire = client_of(Server(director=director, endpoints=[CHAT]))
    client.data_received(request(BODY) + request(BODY))
    assert len(director.exchanges) == 1
    assert up.sent.count(b"POST ") == 1
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    assert wire.sent.endswith(b"{}")
    assert b"connection: close" in wire.sent
    assert wire.closed


def test_a_request_sent_during_an_answer_is_not_served_either() -> None:
    upstream, connection, up = waiting_upstream()
    client, wire = client_of(Server(director=Recorder(upstream), endpoints=[CHAT]))
    client.data_received(request(BODY))
    client.data_received(request(BODY))
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    assert up.sent.count(b"POST ") == 1
    assert wire.closed


def test_nothing_of_the_clients_head_goes_upstream_but_what_is_listed() -> None:
    upstream, _, up = waiting_upstream()
    client, _ = client_of(Server(director=Recorder(upstream, headers=b"x-helexa-usage: 1\r\n"), endpoints=[CHAT]))
    client.data_received(
        request(
            BODY,
            b"Authorization: Bearer secret",
            b"Cookie: a=b",
            b"X-Helexa-Model: other",
            b"X-Forwarded-For: 1.2.3.4",
            b"traceparent: 00-abc-def-01",
            b"X-Request-ID: my.id-1",
        )
    )
    head = up.sent.partition(b"\r\n\r\n")[0].lower()
    names = [line.partition(b":")[0] for line in head.split(b"\r\n")[1:]]
    assert names == [b"host", b"content-type", b"content-length", b"x-helexa-usage", b"x-request-id", b"traceparent"]
    assert b"x-request-id: my.id-1" in head


@pytest.mark.parametrize("given", [b"a" * 129, b"with space", b'quote"', b""])
def test_a_harmful_request_id_is_replaced_by_one_of_ours(given: bytes) -> None:
    upstream, _, up = waiting_upstream()
    client, _ = client_of(Server(director=Recorder(upstream), endpoints=[CHAT]))
    client.data_received(request(BODY, b"x-request-id: " + given))
    assert b"x-request-id: " + given + b"\r\n" not in up.sent
    assert b"x-request-id: " in up.sent


def test_a_body_over_the_limit_is_refused_from_its_length_before_it_is_read() -> None:
    upstream, _, _ = waiting_upstream()
    director = Recorder(upstream)
    client, wire = client_of(Server(director=director, endpoints=[CHAT], body_limit_mb=1))
    client.data_received(b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 1048577\r\n\r\n")
    assert wire.sent.startswith(b"HTTP/1.1 413 ")
    assert b"request_too_large" in wire.sent
    client.data_received(b"x" * 100_000)  # still being sent: thrown away, so that its sender can read the answer
    assert not wire.aborted
    assert director.exchanges == []


def test_a_chunked_body_over_the_limit_is_refused_while_it_is_read() -> None:
    upstream, _, _ = waiting_upstream()
    client, wire = client_of(Server(director=Recorder(upstream), endpoints=[CHAT], body_limit_mb=1))
    client.data_received(b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(20):
        client.data_received(b"20000\r\n" + b"x" * 0x20000 + b"\r\n")
    assert wire.sent.startswith(b"HTTP/1.1 413 ")
    assert wire.sent.count(b"\r\ndate: ") == 1


def test_expect_100_continue_is_answered_before_the_body() -> None:
    upstream, _, _ = waiting_upstream()
    client, wire = client_of(Server(director=Recorder(upstream), endpoints=[CHAT]))
    head, _, body = request(BODY, b"Expect: 100-continue").partition(b"\r\n\r\n")
    client.data_received(head + b"\r\n\r\n")
    assert wire.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.data_received(body)


BODIES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"hello", None),
    (b"[]", None),
    (b'{"model":', None),
    (b"\xff\xfe", None),
    (b'{"model":"\xff"}', None),
    (b'{"model":"a","x":' + b"[" * 100_000, None),
    (b'{"messages":[]}', "model"),
    (b'{"model":null}', "model"),
    (b'{"model":""}', "model"),
    (b'{"model":7}', "model"),
    (b'{"model":"a","stream":"yes"}', "stream"),
    (b'{"model":"a","stream_options":[]}', "stream_options"),
    (b'{"model":"a","stream_options":{"include_usage":1}}', "stream_options.include_usage"),
]


@pytest.mark.parametrize(("body", "param"), BODIES)
def test_a_malformed_body_is_a_400_that_names_the_field_and_the_connection_lives(
    body: bytes, param: str | None
) -> None:
    upstream, _, up = waiting_upstream()
    director = Recorder(upstream)
    client, wire = client_of(Server(director=director, endpoints=[CHAT]))
    client.data_received(request(body))
    assert wire.sent.startswith(b"HTTP/1.1 400 ")
    error = json.loads(wire.sent.partition(b"\r\n\r\n")[2])["error"]
    assert error["param"] == param
    assert error["code"] == "invalid_request_error"
    assert up.sent == b""
    assert not wire.closed
    assert len(director.finished) == 1, "counted, though refused"
    client.data_received(request(BODY))
    assert up.sent != b""


def test_connections_over_the_limit_are_told_so() -> None:
    server = Server(director=Recorder(), endpoints=[CHAT], limits=Limits(connections=1))
    client_of(server)
    _, wire = client_of(server)
    assert wire.sent.startswith(b"HTTP/1.1 503 ")
    assert b"Too many connections" in wire.sent
    assert b"retry-after" in wire.sent
