"""Answers in Ollama's form: what its package's own types read, whatever the cuts, streamed or whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ollama import ChatResponse, EmbeddingsResponse, EmbedResponse, GenerateResponse
from tests.helpers.anthropic_conversations import SAID, Streamed, answers
from tests.helpers.strictly import strictly

from helexa.core import sse
from helexa.core.dialects import neuron_chat
from helexa.core.dialects.ollama_embeddings import Embeddings, embeddings
from helexa.core.dialects.ollama_stream import Answer, Clocks, Lines, Whole, loaded
from helexa.core.errors import BadRequest, HelexaError, UpstreamError

CLOCKS = Clocks(started=1.0, sent=3.5, now=lambda: 10.0, wall=lambda: 1_764_000_000.25)
STAMP = "2025-11-24T16:00:00.250000Z"
DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    return sse.frame(json.dumps(fields).encode())


def delta(finish_reason: str | None = None, **said: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": said, "finish_reason": finish_reason}])


def usage(prompt: int = 9, completion: int = 5, **more: Any) -> bytes:
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion}, **more)


def piece(index: int, arguments: str | None = None, **first: Any) -> bytes:
    function = {"arguments": arguments, **({"name": first.pop("name")} if "name" in first else {})}
    return delta(tool_calls=[{"index": index, "function": function, **first}])


def lines(data: bytes, cuts: list[int] | None = None, *, is_chat: bool = True) -> list[dict[str, Any]]:
    answer = Answer(Lines(model="m:latest", is_chat=is_chat, clocks=CLOCKS), CLOCKS)
    places = sorted(min(cut, len(data)) for cut in cuts or [])
    parts = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
    out = b"".join(map(answer.feed, parts)) + answer.finish()
    assert out.endswith(b"\n")
    return [json.loads(line) for line in out.splitlines()]


def whole(data: bytes, *, is_chat: bool = True) -> dict[str, Any]:
    answer = Answer(Whole(model="m:latest", is_chat=is_chat, clocks=CLOCKS), CLOCKS)
    found: dict[str, Any] = json.loads(answer.feed(data) + answer.finish())
    return found


def collected(stream: list[dict[str, Any]], *, is_chat: bool) -> dict[str, Any]:
    """All lines as one, as a client puts them together."""
    text, thinking, calls = "", "", []
    for line in stream:
        said = line["message"] if is_chat else line
        text += said["content" if is_chat else "response"]
        thinking += said.get("thinking", "")
        calls += said.get("tool_calls", [])
    last = {**stream[-1]}
    beside = ({"thinking": thinking} if thinking else {}) | ({"tool_calls": calls} if calls else {})
    if is_chat:
        return {**last, "message": {"role": "assistant", "content": text, **beside}}
    return {**last, "response": text, **beside}


@given(answers(), st.booleans())
def test_collecting_the_lines_gives_the_whole_answer(answer: Streamed, is_chat: bool) -> None:
    if not is_chat and any(kind == "call" for kind, _ in answer.pieces):
        return  # generate takes no tools
    stream = lines(answer.data, is_chat=is_chat)
    assert collected(stream, is_chat=is_chat) == whole(answer.data, is_chat=is_chat)


@given(answers(), st.lists(st.integers(0, 3000), max_size=8))
def test_any_cut_of_the_bytes_gives_the_same_lines(answer: Streamed, cuts: list[int]) -> None:
    assert lines(answer.data, cuts) == lines(answer.data)


@given(answers())
def test_each_line_and_the_whole_answer_are_strictly_what_the_package_reads(answer: Streamed) -> None:
    for line in [*lines(answer.data), whole(answer.data)]:
        strictly(ChatResponse, line, beside={"message.tool_calls.id", "message.tool_calls.function.index"})


@given(st.lists(SAID, min_size=1))
def test_a_completion_is_told_as_a_generation(texts: list[str]) -> None:
    chunks = [event(choices=[{"index": 0, "text": text, "finish_reason": None}]) for text in texts]
    end = event(
        choices=[{"index": 0, "text": "", "finish_reason": "length"}],
        usage={"prompt_tokens": 2, "completion_tokens": 1},
    )
    stream = lines(b"".join([*chunks, end, DONE]), is_chat=False)
    assert [line["response"] for line in stream] == [*texts, ""]
    for line in stream:
        strictly(GenerateResponse, line)
    assert (stream[-1]["done_reason"], stream[-1]["prompt_eval_count"]) == ("length", 2)


@given(answers())
def test_a_call_is_whole_or_it_is_text(answer: Streamed) -> None:
    """What the token limit cut off is told as the text it is, and ends with `length`."""
    found = whole(answer.data)
    calls = [what for kind, what in answer.pieces if kind == "call"]
    told = found["message"].get("tool_calls", [])
    cut_off = len(calls) - len(told)
    assert cut_off in (0, 1)
    for (call_id, name, arguments), call in zip(calls, told, strict=False):
        assert (call["id"], call["function"]["name"]) == (call_id, name)
        assert call["function"]["arguments"] == json.loads(arguments)
    if cut_off:
        assert found["done_reason"] == "length"
        assert found["message"]["content"].endswith(calls[-1][2])


def test_a_line_for_each_piece_and_a_last_one_with_the_figures() -> None:
    data = delta(role="assistant", content="") + delta(reasoning_content="Hm.") + delta(content="Hi") + delta("stop")
    data += usage(timings={"prompt_ms": 20.5, "predicted_ms": 100}) + DONE
    begin = {"model": "m:latest", "created_at": STAMP}
    assert lines(data) == [
        {**begin, "message": {"role": "assistant", "content": "", "thinking": "Hm."}, "done": False},
        {**begin, "message": {"role": "assistant", "content": "Hi"}, "done": False},
        {
            **begin,
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": "stop",
            "total_duration": 9_000_000_000,
            "load_duration": 2_500_000_000,
            "prompt_eval_count": 9,
            "prompt_eval_duration": 20_500_000,
            "eval_count": 5,
            "eval_duration": 100_000_000,
        },
    ]


def test_without_the_engine_s_times_ours_are_told() -> None:
    times = iter([4.0, 6.0])
    clocks = Clocks(started=1.0, sent=3.5, now=lambda: next(times), wall=CLOCKS.wall)
    answer = Answer(Lines(model="m", is_chat=True, clocks=clocks), clocks)
    last = json.loads((answer.feed(delta(content="Hi") + delta("stop") + DONE) + answer.finish()).splitlines()[-1])
    assert (last["prompt_eval_duration"], last["eval_duration"]) == (500_000_000, 2_000_000_000)
    assert "eval_count" not in last


def test_calls_are_held_back_until_they_are_whole() -> None:
    answer = Answer(Lines(model="m", is_chat=True, clocks=CLOCKS), CLOCKS)
    assert answer.feed(piece(0, "", name="f", id="c0") + piece(0, '{"a":')) == b""
    assert answer.feed(piece(0, "1.50}")) == b""
    out = answer.feed(piece(1, "", name="g"))
    assert b'"arguments":{"a":1.50}' in out  # as the model wrote it
    (first,) = json.loads(out)["message"]["tool_calls"]
    assert first == {"id": "c0", "function": {"index": 0, "name": "f", "arguments": {"a": 1.5}}}
    second, last = map(json.loads, (answer.feed(delta("tool_calls") + DONE) + answer.finish()).splitlines())
    assert second["message"]["tool_calls"] == [{"function": {"index": 1, "name": "g", "arguments": {}}}]
    assert last["done_reason"] == "stop"


def test_log_probabilities_stand_beside_their_text() -> None:
    token = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": [{"token": "Hi", "logprob": -0.5}]}
    chunk = {"index": 0, "delta": {"content": "Hi"}, "finish_reason": None, "logprobs": {"content": [token]}}
    data = event(choices=[chunk]) * 2 + delta("stop") + DONE
    first, second, last = lines(data)
    assert [p["token"] for p in first["logprobs"]] == ["Hi"]
    assert "logprobs" not in last
    assert whole(data)["logprobs"] == first["logprobs"] + second["logprobs"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_loaded_model_is_told_in_one_piece(stream: bool) -> None:
    data = loaded("m", "load", is_chat=True, clocks=CLOCKS, stream=stream)
    assert data.endswith(b"\n") is stream
    strictly(ChatResponse, json.loads(data))
    assert (json.loads(data)["done"], json.loads(data)["done_reason"]) == (True, "load")
    strictly(GenerateResponse, json.loads(loaded("m", "load", is_chat=False, clocks=CLOCKS, stream=stream)))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", UpstreamError),
        (delta(content="Hi"), UpstreamError),
        (b"data: {\n\n", UpstreamError),
        (piece(0, "{}"), UpstreamError),
        (event(error={"message": "no", "code": "invalid_request_error", "param": "stop"}), BadRequest),
    ],
)
def test_what_is_no_whole_answer_is_an_error(data: bytes, error: type[HelexaError]) -> None:
    with pytest.raises(error):
        lines(data)


class Seen:
    tokens = 0
    usage: neuron_chat.Usage | None = None

    def first_token(self) -> None:
        self.tokens += 1

    def ended(self, usage: neuron_chat.Usage | None, finish_reason: str | None, timings: dict[str, Any] | None) -> None:
        self.usage = usage


def test_who_counts_hears_of_the_first_token_and_of_the_end() -> None:
    seen = Seen()
    answer = Answer(Whole(model="m", is_chat=True, clocks=CLOCKS), CLOCKS, witness=seen)
    answer.feed(delta(role="assistant"))
    assert seen.tokens == 0
    answer.feed(delta(content="a") + delta(content="b") + delta("stop") + usage() + DONE)
    assert seen.tokens == 1
    assert seen.usage is not None


# embeddings

VECTORS = (
    b'{"data":[{"index":1,"embedding":[0.5,-1e-7]},{"index":0,"embedding":[1.0,2.0]}],"usage":{"prompt_tokens":4}}'
)


def test_embeddings_come_in_the_order_of_their_inputs_and_as_the_node_wrote_them() -> None:
    seen = Seen()
    mend = Embeddings(model="m", one=False, clocks=CLOCKS, witness=seen)
    assert mend.feed(VECTORS[:30]) + mend.feed(VECTORS[30:]) == b""
    data = mend.finish()
    assert b'"embeddings":[[1.0,2.0],[0.5,-1e-7]]' in data
    strictly(EmbedResponse, json.loads(data))
    assert json.loads(data)["prompt_eval_count"] == 4
    assert seen.usage is not None
    one = Embeddings(model="m", one=True, clocks=CLOCKS)
    one.feed(VECTORS)
    assert json.loads(one.finish()) == {"embedding": [1.0, 2.0]}
    strictly(EmbeddingsResponse, {"embedding": [1.0, 2.0]})
    strictly(EmbedResponse, json.loads(embeddings("m", [], CLOCKS)))


def test_an_answer_that_is_none_of_embeddings_is_the_node_s_failure() -> None:
    mend = Embeddings(model="m", one=False, clocks=CLOCKS)
    mend.feed(b'{"choices":[]}')
    with pytest.raises(UpstreamError):
        mend.finish()
