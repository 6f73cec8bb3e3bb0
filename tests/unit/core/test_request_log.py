"""The line that ends a request: every path has one, and no client can forge another."""

from __future__ import annotations

import json
from typing import Any

from helexa.core.errors import Dialect, ModelNotFound, UpstreamError
from helexa.core.relay.contract import Endpoint, Exchange, Usage
from helexa.core.request_log import FLUSH_AT, RequestLog

CHAT = Endpoint("/v1/chat/completions", Dialect.OPENAI, "/v1/chat/completions")


def exchange(**fields: Any) -> Exchange:
    made = Exchange(
        endpoint=CHAT, head=b"", body=b"x" * 1000, model="m", stream=True, wants_usage=False, gateway_usage=False,
        request_id="r1", client="10.0.0.9", t_start=100.0,
    )  # fmt: skip
    for name, value in {"status": 200, "t_end": 102.0, **fields}.items():
        setattr(made, name, value)
    return made


def written(*exchanges: Exchange, as_json: bool = True) -> list[str]:
    lines: list[str] = []
    log = RequestLog(lines.append, as_json=as_json, now=lambda: 1_764_000_000.0)
    for each in exchanges:
        log.add(each)
    log.flush()
    return "".join(lines).splitlines()


def test_a_finished_stream_tells_its_counts_and_times() -> None:
    usage = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=2)
    (line,) = written(exchange(node="beast", usage=usage, t_first_token=101.0, finish_reason="stop", tried=["benjy"]))
    assert json.loads(line) == {
        "event": "request", "level": "info", "timestamp": "2025-11-24T16:00:00.000Z", "request_id": "r1",
        "client": "10.0.0.9", "endpoint": "/v1/chat/completions", "model": "m", "node": "beast", "status": 200,
        "stream": True, "seconds": 2.0, "first_token_s": 1.0, "prompt_tokens": 7, "completion_tokens": 5,
        "cached_tokens": 2, "tokens_per_s": 4.0, "finish_reason": "stop", "tried": "benjy",
    }  # fmt: skip


def test_a_refused_request_tells_why() -> None:
    (line,) = written(exchange(status=404, error=ModelNotFound("no model is called 'm'")))
    told = json.loads(line)
    assert (told["status"], told["error"], told["message"]) == (404, "model_not_found", "no model is called 'm'")


def test_a_client_that_left_is_told_from_one_that_was_served() -> None:
    (line,) = written(exchange(client_gone=True, reads=4))
    told = json.loads(line)
    assert (told["status"], told["client_gone"], told["reads"]) == (499, True, 4)


def test_a_stream_that_broke_off_is_told_from_one_that_was_left() -> None:
    (line,) = written(exchange(client_gone=False, error=UpstreamError("gone")))
    assert json.loads(line)["status"] == 502


def test_a_model_name_with_line_breaks_cannot_forge_a_line() -> None:
    forged = exchange(model='x\nrequest status=200 evil="yes"')
    assert len(written(forged)) == len(written(forged, as_json=False)) == 1


def test_lines_for_a_terminal_read_as_key_and_value() -> None:
    (line,) = written(exchange(model="a b"), as_json=False)
    assert line.startswith("2025-11-24T16:00:00.000Z [info     ] request request_id=r1 client=10.0.0.9")
    assert 'model="a b"' in line
    assert "stream=true" in line


def test_nothing_is_written_when_nothing_ended() -> None:
    assert written() == []


def test_a_busy_second_is_written_in_pieces_and_keeps_no_bodies() -> None:
    lines: list[str] = []
    log = RequestLog(lines.append, as_json=True, now=lambda: 0.0)
    ended = [exchange() for _ in range(FLUSH_AT)]
    for each in ended:
        log.add(each)
    assert len("".join(lines).splitlines()) == FLUSH_AT
    assert not any(each.body for each in ended)
