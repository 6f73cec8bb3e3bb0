"""A model's host on its socket, over an engine that plays: what is asked reaches it, what it tells the caller."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from tests.helpers.aio import run
from tests.helpers.torch_serving import CONTEXT, Host, PlayedEngine, ended, events_of, host

from helexa.core import sse
from helexa.core.errors import UpstreamError
from helexa.core.relay.upstream import Answer
from helexa.neuron.harness.openai_lists import CHAT, COMPLETIONS, EMBEDDINGS
from helexa.neuron.harness.torch.request import Embedded, Failed, Grammar, Sampling, Text, TokenLogprob

USER = [{"role": "user", "content": "Hi"}]
PROMPT = len("user:Hi|")


@pytest.fixture
def playing() -> Iterator[Host]:
    with host(PlayedEngine(["Hel", "lo"])) as it:
        yield it


@pytest.fixture
def waiting() -> Iterator[Host]:
    with host(PlayedEngine()) as it:
        yield it


def ask(it: Host, body: dict[str, Any], path: str = CHAT, *, key: str = "secret") -> Answer:
    async def fetch() -> Answer:
        upstream = it.upstream(key)
        try:
            return await upstream.fetch("POST", path, json.dumps(body).encode(), timeout_s=10)
        finally:
            upstream.close()

    return run(fetch())


def error_of(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.body)["error"]
    return found


def test_an_answer_in_one_piece(playing: Host) -> None:
    answer = ask(playing, {"messages": USER, "max_tokens": 5}).json(dict[str, Any])
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "completion_tokens": 2,
        "prompt_tokens": PROMPT,
        "total_tokens": PROMPT + 2,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert answer["timings"]["predicted_n"] == 2
    assert answer["timings"]["predicted_per_second"] == 40.0
    assert playing.engine.asked[0].request.max_tokens == 5


def test_a_stream_begins_with_the_role_and_its_timings_stand_at_its_end(playing: Host) -> None:
    chunks = events_of(ask(playing, {"messages": USER, "stream": True}))
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert {c["id"] for c in chunks} == {chunks[0]["id"]}
    assert "usage" not in chunks[-1]
    assert chunks[-1]["timings"]["prompt_n"] == PROMPT
    assert (chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["choices"][0]["stop_reason"]) == ("stop", None)


def test_usage_is_told_in_an_event_of_its_own_to_those_who_ask(playing: Host) -> None:
    asked = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    *_, end, usage = events_of(ask(playing, asked))
    assert "timings" not in end
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == PROMPT + 2
    assert usage["timings"]["cache_n"] == 0


def test_the_prefill_is_told_of_where_that_is_asked_for(playing: Host) -> None:
    chunks = events_of(ask(playing, {"messages": USER, "stream": True, "return_progress": True}))
    told = [c["prompt_progress"] for c in chunks if "prompt_progress" in c]
    assert told == [
        {"total": PROMPT, "cache": 0, "processed": 0, "time_ms": 0},
        {"total": PROMPT, "cache": 0, "processed": PROMPT, "time_ms": 20},
    ]
    assert not any("prompt_progress" in c for c in events_of(ask(playing, {"messages": USER, "stream": True})))


def test_several_choices_are_counted_together_and_their_prompt_once(playing: Host) -> None:
    answer = ask(playing, {"messages": USER, "n": 3, "seed": 7}).json(dict[str, Any])
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (PROMPT, 6)
    assert [a.request.sampling.seed for a in playing.engine.asked] == [7, 8, 9]


def test_several_prompts_are_all_counted_and_echoed(playing: Host) -> None:
    body = {"prompt": ["a", "bcd"], "n": 2, "echo": True}
    answer = ask(playing, body, COMPLETIONS).json(dict[str, Any])
    assert [c["text"] for c in answer["choices"]] == ["aHello", "aHello", "bcdHello", "bcdHello"]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (2 + 4, 8)
    assert answer["object"] == "text_completion"
    streamed = events_of(ask(playing, body | {"stream": True}, COMPLETIONS))
    texts = {0: "", 1: "", 2: "", 3: ""}
    for chunk in streamed:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [c["text"] for c in answer["choices"]]


def test_a_prompt_of_tokens_is_taken_as_it_is(playing: Host) -> None:
    ask(playing, {"prompt": [5, 6, 7]}, COMPLETIONS)
    ask(playing, {"prompt": [[5], [6, 7]]}, COMPLETIONS)
    assert [a.request.prompt for a in playing.engine.asked] == [(5, 6, 7), (5,), (6, 7)]


def test_a_window_of_no_tokens_turns_the_repetition_penalty_off(playing: Host) -> None:
    for window in (0, 64):
        ask(playing, {"messages": USER, "repetition_penalty": 1.5, "repeat_last_n": window})
    assert [a.request.sampling.repetition_penalty for a in playing.engine.asked] == [1.0, 1.5]


def test_what_a_request_says_of_sampling_reaches_the_engine(playing: Host) -> None:
    ask(
        playing,
        {
            "messages": USER,
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 3,
            "min_p": 0.1,
            "repeat_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "logit_bias": {"5": -100, "6": 1.5},
            "seed": 4,
            "stop": ["x", "yz"],
            "ignore_eos": True,
            "response_format": {"type": "json_object"},
        },
    )
    request = playing.engine.asked[0].request
    assert request.sampling == Sampling(0, 3, 0.5, 0.1, 1.1, 0.2, 0.3, {5: -100.0, 6: 1.5}, 4)
    assert (request.stops, request.ignore_eos, request.grammar) == (("x", "yz"), True, Grammar("json_object"))


def test_the_stop_string_that_hit_is_told(waiting: Host) -> None:
    async def scenario() -> Answer:
        upstream = waiting.upstream()
        body = json.dumps({"messages": USER, "stop": ["x"], "stream": True}).encode()
        fetching = asyncio.create_task(upstream.fetch("POST", CHAT, body, timeout_s=10))
        (asked,) = await asyncio.to_thread(waiting.engine.wait_for)
        asked.say("a", stop_reason="x")
        answer = await fetching
        upstream.close()
        return answer

    assert events_of(run(scenario()))[-1]["choices"][0]["stop_reason"] == "x"


def logprob(token: int, text: bytes, value: float, *top: TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token, text, value, top)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_chat_and_completions(waiting: Host, stream: bool) -> None:
    half = logprob(9, b"\xc3", -2.0)
    tokens = (logprob(4, b"ab", -0.5, logprob(4, b"ab", -0.5), half), logprob(5, b"c", -1.0, half, half))

    async def scenario(path: str, body: dict[str, Any]) -> Answer:
        upstream = waiting.upstream()
        before = len(waiting.engine.asked)
        fetching = asyncio.create_task(
            upstream.fetch("POST", path, json.dumps(body | {"stream": stream}).encode(), timeout_s=10)
        )
        asked = (await asyncio.to_thread(waiting.engine.wait_for, before + 1))[-1]
        asked.tell(Text("abc", 2, tokens), ended(3, 2, "length"))
        answer = await fetching
        upstream.close()
        return answer

    def choices(answer: Answer) -> list[dict[str, Any]]:
        chunks = events_of(answer) if stream else [json.loads(answer.body)]
        return [c for chunk in chunks for c in chunk["choices"] if c.get("logprobs")]

    (chat,) = choices(run(scenario(CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 2})))
    first, second = chat["logprobs"]["content"]
    assert (first["token"], first["bytes"], first["logprob"]) == ("ab", [97, 98], -0.5)
    assert [top["token"] for top in first["top_logprobs"]] == ["ab", "\ufffd"]
    assert len(second["top_logprobs"]) == 2
    (told,) = choices(run(scenario(COMPLETIONS, {"prompt": "x", "logprobs": 1})))
    assert told["logprobs"] == {
        "tokens": ["ab", "c"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"ab": -0.5}, {"\ufffd": -2.0}],
        "text_offset": [0, 2],
    }


def test_embeddings_as_numbers_as_base64_and_cut(waiting: Host) -> None:
    async def scenario(body: dict[str, Any]) -> Any:
        upstream = waiting.upstream()
        before = len(waiting.engine.asked)
        fetching = asyncio.create_task(upstream.fetch("POST", EMBEDDINGS, json.dumps(body).encode(), timeout_s=10))
        for asked in (await asyncio.to_thread(waiting.engine.wait_for, before + 2))[before:]:
            assert asked.request.pooling == "last"
            asked.tell(Embedded(array("f", [0.6, 0.8, 0.0])), ended(2, 0))
        answer = await fetching
        upstream.close()
        return answer.json(dict[str, Any])

    told = run(scenario({"input": ["a", "b"]}))
    assert [d["index"] for d in told["data"]] == [0, 1]
    assert told["data"][1]["embedding"] == pytest.approx([0.6, 0.8, 0.0])
    assert told["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    raw = run(scenario({"input": ["a", "b"], "encoding_format": "base64"}))["data"][0]["embedding"]
    assert struct.unpack("<3f", base64.b64decode(raw)) == pytest.approx((0.6, 0.8, 0.0))
    assert run(scenario({"input": ["a", "b"], "dimensions": 1}))["data"][0]["embedding"] == [1.0]


# refusals


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": "x"}, "messages"),
        ({"messages": USER, "n": 5}, "n"),
        ({"messages": USER, "top_k": "many"}, "top_k"),
        ({"messages": USER, "min_p": 2}, "min_p"),
        ({"messages": USER, "mirostat": 2}, "mirostat"),
        ({"messages": USER, "repetition_penalty": 0}, "repetition_penalty"),
        ({"messages": USER, "logit_bias": {"word": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"128": 1}}, "logit_bias"),
        ({"messages": USER, "thinking_budget_tokens": 8}, "thinking_budget_tokens"),
    ],
)
def test_a_bad_field_is_named(playing: Host, body: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        answer = ask(playing, body | {"stream": stream})
        assert (answer.status, error_of(answer)["param"]) == (400, param)
    assert not playing.engine.asked


def test_a_prompt_over_the_context_is_refused_with_both_figures(playing: Host) -> None:
    answer = ask(playing, {"messages": [{"role": "user", "content": "x" * CONTEXT}]})
    error = error_of(answer)
    assert (answer.status, error["code"]) == (400, "context_length_exceeded")
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (CONTEXT + len("user:|"), CONTEXT)
    assert error_of(ask(playing, {"prompt": "x" * CONTEXT}, COMPLETIONS))["param"] == "prompt"


def test_who_has_no_key_is_refused_and_health_is_for_everybody(playing: Host) -> None:
    assert ask(playing, {"messages": USER}, key="guess").status == 401
    assert ask(playing, {}, "/health", key="guess").status == 200
    assert ask(playing, {}, "/v1/nothing").status == 404


def test_a_suffix_is_refused_where_the_model_has_no_tokens_for_it(playing: Host) -> None:
    assert error_of(ask(playing, {"prompt": "a", "suffix": "b"}, COMPLETIONS))["param"] == "suffix"


# failures


def test_a_failure_before_the_first_token_has_its_status(waiting: Host) -> None:
    async def scenario(stream: bool) -> Answer:
        upstream = waiting.upstream()
        before = len(waiting.engine.asked)
        body = json.dumps({"messages": USER, "stream": stream}).encode()
        fetching = asyncio.create_task(upstream.fetch("POST", CHAT, body, timeout_s=10))
        asked = (await asyncio.to_thread(waiting.engine.wait_for, before + 1))[-1]
        asked.tell(Failed(UpstreamError("tiny: rank 1 died")))
        answer = await fetching
        upstream.close()
        return answer

    for stream in (False, True):
        answer = run(scenario(stream))
        assert (answer.status, error_of(answer)["message"]) == (502, "tiny: rank 1 died")


def test_a_failure_behind_the_first_token_is_the_last_event_and_no_done_follows(waiting: Host) -> None:
    async def scenario() -> Answer:
        upstream = waiting.upstream()
        body = json.dumps({"messages": USER, "stream": True}).encode()
        fetching = asyncio.create_task(upstream.fetch("POST", CHAT, body, timeout_s=10))
        (asked,) = await asyncio.to_thread(waiting.engine.wait_for)
        asked.tell(Text("a", 1), Failed(UpstreamError("tiny: rank 1 died")))
        answer = await fetching
        upstream.close()
        return answer

    answer = run(scenario())
    assert answer.status == 200
    assert b'"content":"a"' in answer.body
    assert b"[DONE]" not in answer.body
    *_, last = sse.EventReader().feed(answer.body)
    assert json.loads(last.data)["error"]["message"] == "tiny: rank 1 died"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_who_leaves_cancels_every_choice(waiting: Host, stream: bool, begun: bool) -> None:
    async def scenario() -> None:
        reader, writer = await asyncio.open_unix_connection(str(waiting.socket))
        body = json.dumps({"messages": USER, "stream": stream, "n": 2}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        both = await asyncio.to_thread(waiting.engine.wait_for, 2)
        if begun:
            both[0].tell(Text("a", 1))
            if stream:
                await reader.readuntil(b'"content":"a"')
        writer.close()
        for asked in both:
            assert await asyncio.to_thread(asked.cancelled.wait, 5)

    run(scenario())


def test_the_server_answers_while_a_prompt_is_rendered() -> None:
    """Templates and tokenizers have threads of their own."""
    import threading

    entered, go_on = threading.Event(), threading.Event()

    class Slow:
        text = ""

        def render(self, messages: Any, **_: Any) -> str:
            entered.set()
            assert go_on.wait(10)
            return "x"

    async def scenario(it: Host) -> None:
        upstream = it.upstream()
        body = json.dumps({"messages": USER}).encode()
        slow = asyncio.create_task(upstream.fetch("POST", CHAT, body, timeout_s=10))
        assert await asyncio.to_thread(entered.wait, 5)
        assert (await upstream.fetch("GET", "/health", timeout_s=5)).status == 200
        go_on.set()
        assert (await slow).status == 200
        upstream.close()

    with host(PlayedEngine(["a"]), template=Slow) as it:
        run(scenario(it))


# counting


def test_tokens_are_counted_as_the_request_has_them_also_over_the_context(playing: Host) -> None:
    assert ask(playing, {"messages": USER}, "/v1/tokens/count").json(dict[str, int]) == {"input_tokens": PROMPT}
    long = {"messages": [{"role": "user", "content": "x" * CONTEXT}]}
    assert ask(playing, long, "/v1/tokens/count").json(dict[str, int])["input_tokens"] == CONTEXT + len("user:|")


def test_a_host_that_only_counts_generates_nothing() -> None:
    with host(PlayedEngine(["a"]), counts=True) as it:
        assert ask(it, {"messages": USER}, "/v1/tokens/count").status == 200
        assert ask(it, {"messages": USER}).status == 404
