"""Safetensors models on a real node, which isolates nothing but what has to be: answers, deaths, and what is left."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.helpers.aio import run
from tests.helpers.llama_engine import KEY, engine
from tests.helpers.neuron_daemon import Daemon, neuron
from tests.helpers.safetensors_models import random_model, smollm2
from tests.helpers.torch_serving import need_torch

from helexa.core.relay.upstream import Answer, Upstream
from helexa.neuron.harness import openai_fields as fields
from helexa.neuron.harness.llama.session import LlamaSession

pytestmark = pytest.mark.timeout(180)

USER = [{"role": "user", "content": "Name a colour."}]
# Qwen's form, as far as it matters: tools in the system message, calls in tags, a thought before the answer.
TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
{{- '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' if think else '<|im_start|>assistant\n' }}
{%- endif %}"""
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
CALLS = [
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    need_torch()
    limit = "memory_limit_mb = [4000]"  # what is free is then told by the accounts, whatever else this machine does
    with neuron(tmp_path_factory.mktemp("node"), f'isolation = "none"\n{limit}') as daemon:
        yield daemon


def load(node: Daemon, name: str, folder: Path, **profile: Any) -> str:
    asked = {"model_id": name, "source": str(folder), "slots": 2, "threads": 2, **profile}
    answer = node.http.request("POST", "/models/load?wait=true", json=asked, timeout_s=120)
    assert answer.status == 200, answer.text
    return name


def unload(node: Daemon, name: str) -> None:
    assert node.http.post("/models/unload", json={"model_id": name, "force": True}).status == 200


@pytest.fixture(scope="module")
def talker(node: Daemon) -> Iterator[str]:
    """SmolLM2 with a template that knows tools and thoughts."""
    yield load(node, "talker", smollm2(), context=1024, chat_template=TEMPLATE)
    unload(node, "talker")


@pytest.fixture(scope="module")
def babbler(node: Daemon) -> Iterator[str]:
    """A tiny model over two ranks."""
    yield load(node, "babbler", random_model("llama"), context=512, tensor_parallel=2)
    unload(node, "babbler")


def ask(node: Daemon, model: str, path: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    answer = node.http.request("POST", path, json={"model": model, "temperature": 0, **body}, timeout_s=60)
    assert answer.status == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def status(node: Daemon, model: str) -> str:
    (found,) = [m["status"] for m in node.http.get("/models").json() if m["id"] == model]
    return str(found)


def until(condition: Callable[[], bool], what: str, within_s: float = 60) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, f"not within {within_s} s: {what}"
        time.sleep(0.02)


def family(node: Daemon) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Hosts, and ranks beside them."""
    every = psutil.Process(node.process.pid).children(recursive=True)
    ranks = [p for p in every if "--worker" in p.cmdline()]
    return [p for p in every if "helexa.neuron.host" in p.cmdline()], ranks


# what is shown to the model


class Listening:
    """An engine's address; keeps what it tokenized."""

    def __init__(self, address: str) -> None:
        self._upstream = Upstream("engine", address, headers={"authorization": f"Bearer {KEY}"})
        self.tokens: list[int] = []

    async def fetch(self, method: str, path: str, body: bytes | None = None, **_: Any) -> Answer:
        answer = await self._upstream.fetch(method, path, body)
        if path == "/tokenize":
            self.tokens = answer.json(dict[str, Any])["tokens"]
        return answer

    def close(self) -> None:
        self._upstream.close()


BODIES: list[dict[str, Any]] = [
    {"messages": USER},
    {"messages": [{"role": "system", "content": "Ünïcödé 你好 👩‍👩‍👧 <|im_end|>  "}, *USER]},
    {"messages": [{"role": "user", "content": "  a\r\nb"}, {"role": "assistant", "content": "It is"}]},
    {"messages": [{"role": "developer", "content": "Be brief."}, *USER]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    {"messages": USER, "tools": [ADD]},
    {"messages": [*USER, *CALLS], "tools": [ADD], "tool_choice": "none"},
    {"messages": [*USER, *CALLS]},
    {"messages": [*USER, *CALLS], "tools": [ADD]},
]


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["its own", "with tools"])
def test_prompts_are_rendered_alike_by_both_harnesses(tmp_path: Path, template: str | None) -> None:
    need_torch()
    from helexa.neuron.harness.torch.host import prompts_of

    ours = prompts_of({"folder": str(smollm2()), "model_id": "m", "context": 2048, "chat_template": template})
    profile = {} if template is None else {"chat_template": template}
    with engine(tmp_path, **profile) as (address, session):
        assert isinstance(session, LlamaSession)

        async def theirs() -> list[list[int]]:
            listening = Listening(address)
            await session.learn(listening)  # type: ignore[arg-type]
            found = []
            for body in BODIES:
                await session.count_tokens(json.dumps(body).encode(), listening)  # type: ignore[arg-type]
                found.append(listening.tokens)
            listening.close()
            return found

        for body, tokens in zip(BODIES, run(theirs()), strict=True):
            raw = json.dumps(body).encode()
            assert list(ours.of_chat(raw, fields.read_chat(raw, max_choices=4, context=2048))) == tokens, body


def test_tokens_are_counted_as_the_request_has_them_without_a_load(node: Daemon) -> None:
    profile = {"model_id": "counted", "source": str(random_model("qwen3"))}
    counts = [
        node.http.post("/v1/tokens/count", json={"model": "counted", "profile": profile, **body}).json()
        for body in BODIES
    ]
    (host,) = [h for h in family(node)[0] if "helexa.neuron.harness.torch:TorchCounter" in h.cmdline()]
    assert not any("libtorch" in mapped.path for mapped in host.memory_maps())
    assert not any(m["id"] == "counted" and m["status"] != "unloaded" for m in node.http.get("/models").json())
    load(node, "counted", random_model("qwen3"), context=512)
    for body, count in zip(BODIES, counts, strict=True):
        answer = ask(node, "counted", max_tokens=1, **body)
        assert answer["usage"]["prompt_tokens"] == count["input_tokens"], body
        again = node.http.post("/v1/tokens/count", json={"model": "counted", **body}).json()
        assert again == count
    unload(node, "counted")


# what comes back


def test_thoughts_are_told_apart_and_counted(node: Daemon, talker: str) -> None:
    grammar = 'root ::= "<think>\\nI see.\\n</think>\\n\\nYes."'
    answer = ask(node, talker, messages=USER, grammar=grammar, max_tokens=40)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("I see.", "Yes.")
    usage = answer["usage"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


def test_an_answer_with_tools_streams_to_its_end(node: Daemon, talker: str) -> None:
    body = {"model": talker, "messages": USER, "tools": [ADD], "stream": True, "max_tokens": 12, "temperature": 0}
    with node.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        *events, last, done = stream.events()
    assert done == "[DONE]"
    assert last["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
    (whole,) = ask(node, talker, messages=USER, tools=[ADD], max_tokens=12)["choices"]
    assert (whole["message"]["content"] or "") == text


def test_a_schema_beside_tools_gives_an_answer_or_a_call(node: Daemon, talker: str) -> None:
    schema = {"type": "object", "properties": {"sum": {"const": 3}}, "required": ["sum"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    (choice,) = ask(node, talker, messages=USER, tools=[ADD], response_format=wanted, max_tokens=60)["choices"]
    if choice["finish_reason"] == "tool_calls":
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "add"
    else:
        assert json.loads(choice["message"]["content"]) == {"sum": 3}


def test_a_second_turn_finds_the_first_in_the_cache(node: Daemon, talker: str) -> None:
    messages = [{"role": "user", "content": "Tell me of the sea. " * 30}]
    first = ask(node, talker, messages=messages, max_tokens=4)
    turn = [*messages, first["choices"][0]["message"], {"role": "user", "content": "And?"}]
    second = ask(node, talker, messages=turn, max_tokens=4)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"] - 64
    assert second["timings"]["cache_n"] == cached


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}}, "response_format"),
        ({"grammar": 'root ::= "a'}, "grammar"),
        ({"min_p": "x"}, "min_p"),
    ],
)
def test_what_only_the_engine_can_judge_names_its_field(
    node: Daemon, talker: str, body: dict[str, Any], param: str
) -> None:
    answer = node.http.post("/v1/chat/completions", json={"model": talker, "messages": USER, **body})
    assert (answer.status, answer.json()["error"]["param"]) == (400, param)


def test_an_embedding_model_embeds(node: Daemon) -> None:
    load(node, "vectors", random_model("qwen3-embedding"), capabilities=["embed", "dimensions"])
    told = ask(node, "vectors", "/v1/embeddings", input=["the sea", "the see", "xyz"])
    vectors = [entry["embedding"] for entry in told["data"]]
    assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1, 1, 1], abs=1e-4)
    again = ask(node, "vectors", "/v1/embeddings", input="the sea", dimensions=8)
    assert len(again["data"][0]["embedding"]) == 8
    assert node.http.post("/v1/chat/completions", json={"model": "vectors", "messages": USER}).status == 400
    unload(node, "vectors")


# deaths and ends


@pytest.mark.parametrize("victim", ["host", "rank"])
def test_who_dies_is_told_to_its_clients_and_comes_back(node: Daemon, babbler: str, victim: str) -> None:
    hosts, ranks = family(node)
    (rank,) = ranks
    (host,) = [h for h in hosts if h.pid == rank.ppid()]
    body = {"model": babbler, "messages": USER, "stream": True, "max_tokens": 400, "ignore_eos": True}
    with node.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        events = stream.events()
        next(events)
        os.kill(host.pid if victim == "host" else rank.pid, signal.SIGKILL)
        *_, last = events
    assert last["error"]["code"] == "upstream_error"
    _, alive = psutil.wait_procs([host, rank], timeout=5)
    assert not alive, "all of them are gone within 5 s"
    until(lambda: status(node, babbler) == "loaded", "it comes back")
    assert ask(node, babbler, messages=USER, max_tokens=2)["usage"]["completion_tokens"] > 0


def test_an_unload_leaves_no_process_and_gives_all_memory_back(node: Daemon) -> None:
    before, beside = family(node), set(node.runtime.rglob("*.sock"))
    free = node.http.get("/health").json()["devices"][0]["vram_free_mb"]
    load(node, "guest", random_model("llama"), context=512, tensor_parallel=2)
    hosts, ranks = family(node)
    assert (len(hosts) - len(before[0]), len(ranks) - len(before[1])) == (1, 1)
    ask(node, "guest", messages=USER, max_tokens=2)
    unload(node, "guest")
    assert tuple(map(len, family(node))) == tuple(map(len, before))
    assert set(node.runtime.rglob("*.sock")) == beside
    assert node.http.get("/health").json()["devices"][0]["vram_free_mb"] == free


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_engine(node: Daemon, babbler: str, stream: bool) -> None:
    body = {"model": babbler, "messages": USER, "max_tokens": 450, "ignore_eos": True, "stream": stream}
    if stream:
        with node.http.stream("POST", "/v1/chat/completions", json=body) as streaming:
            next(streaming.events())
    else:
        with pytest.raises(TimeoutError):
            node.http.request("POST", "/v1/chat/completions", json=body, timeout_s=0.2)
    until(lambda: not active(node, babbler), "its seat is free", 5)
    assert ask(node, babbler, messages=USER, max_tokens=1)["usage"]["completion_tokens"] == 1


def active(node: Daemon, model: str) -> int:
    (info,) = [m for m in node.http.get("/models").json() if m["id"] == model]
    return int(info.get("active_requests") or 0)


def test_an_impossible_world_size_is_refused_before_anything_loads(node: Daemon) -> None:
    asked = {"model_id": "split", "source": str(random_model("llama")), "tensor_parallel": 5}
    answer = node.http.post("/models/load?wait=true", json=asked)
    assert answer.status == 400
    assert "World sizes that work: 1 to 4" in answer.json()["error"]["message"]
    told = node.http.post("/models/estimate", json={**asked, "tensor_parallel": 2}).json()
    assert [rank["rank"] for rank in told["ranks"]] == [0, 1]
