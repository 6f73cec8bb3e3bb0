"""Ollama's requests as they come over the wire, and what of them we know. Wire types and lists only.

Three lists, held to docs/reference/ollama.md by a test: what is honoured; what is known and not supported (dropped and
named in `x-helexa-dropped`, or refused); whatever stands on neither is unknown and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from helexa.core.bodies import MAX_MESSAGES, MAX_TOOLS

Number = float | None


class Options(msgspec.Struct):
    """Whole numbers too are floats here: Ollama takes 4096.0 for 4096, and clients whose language has one kind of
    number send it."""

    temperature: Number = None
    top_k: Number = None
    top_p: Number = None
    min_p: Number = None
    typical_p: Number = None
    repeat_last_n: Number = None
    repeat_penalty: Number = None
    presence_penalty: Number = None
    frequency_penalty: Number = None
    mirostat: Number = None
    mirostat_tau: Number = None
    mirostat_eta: Number = None
    seed: Number = None
    num_predict: Number = None
    num_ctx: Number = None
    stop: list[str] | str | None = None
    # known and not supported; any type will do
    num_keep: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    num_thread: Any = None
    numa: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    low_vram: Any = None
    f16_kv: Any = None
    logits_all: Any = None
    vocab_only: Any = None
    embedding_only: Any = None
    penalize_newline: Any = None
    tfs_z: Any = None


# How a node calls what it honours, where it is passed on as it is.
SAMPLING: Final = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "mirostat_tau",
    "mirostat_eta",
)
SAMPLING_WHOLE: Final = ("top_k", "repeat_last_n", "mirostat", "seed")
HONOURED_OPTIONS: Final = frozenset({*SAMPLING, *SAMPLING_WHOLE, "num_predict", "num_ctx", "stop"})
# How a model is loaded is its profile's, the same for all who ask; the rest went out of the engines.
DROPPED_OPTIONS: Final = tuple(name for name in Options.__struct_fields__ if name not in HONOURED_OPTIONS)


class Called(msgspec.Struct):
    name: str = ""
    arguments: msgspec.Raw = msgspec.Raw()  # kept as it came: a call's numbers are the client's


class ToolCall(msgspec.Struct):
    id: str | None = None
    function: Called | None = None


class Message(msgspec.Struct):
    role: str = ""
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Generation(msgspec.Struct):
    """What chat and generate have in common."""

    model: str | None = None
    stream: bool | None = None
    format: msgspec.Raw = msgspec.Raw()
    options: Options | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # known and not supported
    keep_alive: Any = None
    truncate: Any = None
    shift: Any = None


class Chat(Generation):
    messages: Annotated[list[Message], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    # OpenAI's form, and the node's to judge
    tools: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_TOOLS)] | None = None


class Generate(Generation):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    images: list[str] | None = None
    raw: bool | None = None
    # known and not supported
    template: Any = None
    context: Any = None
    width: Any = None
    height: Any = None
    steps: Any = None


class Embed(msgspec.Struct):
    model: str | None = None
    input: str | list[str] | None = None
    dimensions: int | None = None
    # known and not supported
    options: dict[str, Any] | None = None
    keep_alive: Any = None
    truncate: Any = None


class Embeddings(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    # known and not supported
    options: dict[str, Any] | None = None
    keep_alive: Any = None


_GENERATION: Final = ("model", "stream", "format", "options", "think", "logprobs", "top_logprobs")
# By path. Dropped and named: the answer is a good one without them.
HONOURED: Final[dict[str, frozenset[str]]] = {
    "/api/chat": frozenset({*_GENERATION, "messages", "tools"}),
    "/api/generate": frozenset({*_GENERATION, "prompt", "suffix", "system", "images", "raw"}),
    "/api/embed": frozenset({"model", "input", "dimensions"}),
    "/api/embeddings": frozenset({"model", "prompt"}),
}
DROPPED: Final[dict[str, tuple[str, ...]]] = {
    "/api/chat": ("keep_alive", "truncate", "shift"),
    "/api/generate": ("keep_alive", "truncate", "shift"),
    "/api/embed": ("keep_alive", "truncate", "options"),
    "/api/embeddings": ("keep_alive", "options"),
}
# What such a field says when it asks for what happens anyway: nothing is cut from a prompt here.
ORDINARY: Final[dict[str, tuple[Any, ...]]] = {"truncate": (False,), "shift": (False,), "options": ({},)}
# Refused: the answer would be another one than was asked for.
REFUSED: Final[dict[str, tuple[str, ...]]] = {
    "/api/generate": ("template", "context", "width", "height", "steps"),
}
# What such a field says when it asks for nothing: several clients send all that they know.
EMPTY: Final[tuple[Any, ...]] = (None, "", [], 0)
