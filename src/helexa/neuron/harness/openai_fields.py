"""OpenAI request fields: their types, their ranges, and how a wrong one is named. Shared by the harnesses. Pure.

A Struct names what we judge; what a field means to an engine is the harness's business, and a field that no Struct
names passes unread (engines have samplers of their own). The rule for the rest is reject or honour: a parameter that
we know and cannot honour is refused by name, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from helexa.core.bodies import decode
from helexa.core.errors import BadRequest

MAX_STOPS: Final = 16  # OpenAI takes 4, Anthropic and vLLM more; a bound so that no request makes each token costly
MAX_TOP_LOGPROBS: Final = 20  # OpenAI's
MAX_PROMPTS: Final = 2048  # OpenAI's bound for embeddings and completions
_BIAS: Final = 100.0
_NAME: Final = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")  # OpenAI's, and what MCP servers put between parts of a name

Number = float | None


class ImageUrl(msgspec.Struct):
    url: str = ""


class Part(msgspec.Struct):
    """One part of a message's content. Text and addresses are read; the rest is the engine's to decode."""

    type: str = ""
    text: str | None = None
    image_url: ImageUrl | None = None


class FunctionCall(msgspec.Struct):
    name: str = ""
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct):
    id: str | None = None
    type: str | None = None
    function: FunctionCall | None = None


class Message(msgspec.Struct):
    role: str = ""
    content: str | list[Part] | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(msgspec.Struct):
    name: str = ""
    # UNSET tells an absent key from a null, which engines refuse.
    description: str | UnsetType | None = UNSET
    parameters: dict[str, Any] | UnsetType | None = UNSET
    strict: bool | UnsetType | None = UNSET

    @property
    def schema(self) -> dict[str, Any] | None:
        """Of the arguments, where it says anything."""
        return self.parameters if isinstance(self.parameters, dict) else None

    @property
    def has_nulls(self) -> bool:
        return self.description is None or self.parameters is None or self.strict is None


class Tool(msgspec.Struct):
    type: str = ""
    function: Function | None = None


class NamedFunction(msgspec.Struct):
    name: str = ""


class NamedTool(msgspec.Struct):
    type: str = "function"
    function: NamedFunction | None = None


class JsonSchema(msgspec.Struct):
    name: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: str = ""
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None  # llama.cpp's own spelling, beside type json_object


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Generation(msgspec.Struct):
    """What chat and completions have in common."""

    model: str | None = None
    # UNSET tells an absent key, which may be put first, from a null, which would win over it.
    stream: bool | UnsetType | None = UNSET
    stream_options: StreamOptions | UnsetType | None = UNSET
    return_progress: bool | UnsetType | None = UNSET
    n: int | None = None
    max_tokens: int | None = None
    temperature: Number = None
    top_p: Number = None
    presence_penalty: Number = None
    frequency_penalty: Number = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | list[Any] | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    service_tier: Any = None
    timings_per_token: bool | None = None
    # Samplers of llama.cpp that could take a node down, or go round our own checks.
    repeat_last_n: int | None = None
    dry_penalty_last_n: int | None = None
    n_probs: int | None = None
    n_cmpl: int | None = None

    @property
    def wants_usage(self) -> bool:
        return isinstance(self.stream_options, StreamOptions) and self.stream_options.include_usage is True

    @property
    def wants_json(self) -> bool:
        """The answer is bound to be JSON."""
        return self.json_schema is not None or (
            self.response_format is not None and self.response_format.type != "text"
        )

    @property
    def wanted_schema(self) -> dict[str, Any] | bool | None:
        """The schema that the answer is bound to; None also where any JSON object will do."""
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_schema" and wanted.json_schema is not None:
            return wanted.json_schema.schema
        if wanted is not None and wanted.type == "json_object" and wanted.schema is not None:
            return wanted.schema
        return self.json_schema

    @property
    def stops(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or ()


class ChatRequest(Generation):
    messages: list[Message] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Known, and not ours to honour: refused unless they say what happens anyway.
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    web_search_options: dict[str, Any] | None = None
    store: bool | None = None
    # Known, and answered without.
    verbosity: Any = None
    prediction: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    @property
    def forced_tool(self) -> bool:
        return self.tool_choice is not None and self.tool_choice not in ("auto", "none")


class CompletionRequest(Generation):
    prompt: str | list[Any] | None = None
    max_completion_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def texts(self) -> list[str] | None:
        """The prompts; None where they are tokens."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt or []
        return prompts if all(isinstance(prompt, str) for prompt in prompts) else None


class EmbeddingRequest(msgspec.Struct):
    model: str | None = None
    input: str | list[Any] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None


class RerankRequest(msgspec.Struct):
    model: str | None = None
    query: str | None = None
    documents: list[str | dict[str, Any]] | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    # Known, and not ours to honour.
    rank_fields: Any = None
    return_embeddings: bool | None = None
    max_chunks_per_doc: Any = None
    max_tokens_per_doc: Any = None
    truncation: Any = None
    truncate: Any = None
    priority: Any = None


_chat = msgspec.json.Decoder(ChatRequest)
_completion = msgspec.json.Decoder(CompletionRequest)
_embedding = msgspec.json.Decoder(EmbeddingRequest)
_rerank = msgspec.json.Decoder(RerankRequest)


def read_chat(body: bytes, *, max_choices: int, context: int) -> ChatRequest:
    """HOT. The fields of a chat request, judged. Raises BadRequest with `param`. Modalities and tools against the
    model's abilities are the caller's to judge."""
    chat = decode(_chat, body)
    if not chat.messages:
        raise _bad("messages", "must be a list of at least one message")
    for i, message in enumerate(chat.messages):
        if type(message.content) is not str:
            _check_content(message, i)
        if not message.role:
            raise _bad(f"messages[{i}].role", "is required")
        if message.tool_calls:
            _check_tool_calls(message.tool_calls, i)
    _check_generation(chat, max_choices, context)
    _check_limit("max_completion_tokens", chat.max_completion_tokens)
    if chat.top_logprobs is not None:
        if not chat.logprobs:
            raise _bad("top_logprobs", "needs `logprobs: true`")
        _check_range("top_logprobs", chat.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if chat.tools is not None:
        _check_tools(chat.tools)
    if chat.tool_choice is not None:
        _check_tool_choice(chat)
    if chat.modalities is not None and any(m != "text" for m in chat.modalities):
        raise _bad("modalities", 'can only be ["text"]: this model\'s answers are text')
    for name in ("audio", "web_search_options"):
        if getattr(chat, name) is not None:
            raise _bad(name, "is not supported; leave it out")
    if chat.functions or chat.function_call is not None:
        name = "functions" if chat.functions else "function_call"
        raise _bad(name, "is OpenAI's deprecated form and not supported; use `tools` and `tool_choice`")
    if chat.store:
        raise _bad("store", "cannot be true: nothing is stored here; leave it out")
    return chat


def read_completion(body: bytes, *, max_choices: int, context: int) -> CompletionRequest:
    """HOT. The fields of a completion request, judged. Raises BadRequest with `param`."""
    asked = decode(_completion, body)
    if asked.prompt is None or asked.prompt == []:
        raise _bad("prompt", "is required: a text, a list of tokens, or a list of either")
    if isinstance(asked.prompt, list):
        _check_texts_or_tokens("prompt", asked.prompt)
    _check_generation(asked, max_choices, context)
    _check_limit("max_completion_tokens", asked.max_completion_tokens)
    if asked.logprobs is not None:
        _check_range("logprobs", asked.logprobs, 0, MAX_TOP_LOGPROBS)
    if asked.echo and asked.logprobs is not None:
        raise _bad("echo", "cannot go with `logprobs`: those of the prompt are not known")
    if asked.echo and asked.texts is None:
        raise _bad("echo", "needs the prompt as text, not as tokens")
    if asked.suffix and not isinstance(asked.prompt, str):
        raise _bad("suffix", "needs one prompt, as text")
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise _bad("best_of", "is not supported beyond `n`; ask for `n` answers and choose")
    return asked


def read_embedding(body: bytes) -> EmbeddingRequest:
    """The fields of an embedding request, judged. Raises BadRequest with `param`."""
    asked = decode(_embedding, body)
    if asked.input is None or asked.input in ("", []):
        raise _bad("input", "is required: a text, a list of tokens, or a list of either, none of them empty")
    if isinstance(asked.input, list):
        _check_texts_or_tokens("input", asked.input)
    if asked.encoding_format not in (None, "float", "base64"):
        raise _bad("encoding_format", f"{asked.encoding_format!r} is not known; use float or base64")
    if asked.dimensions is not None:
        _check_range("dimensions", asked.dimensions, 1, None)
    return asked


def read_rerank(body: bytes) -> RerankRequest:
    """The fields of a rerank request, judged. Raises BadRequest with `param`."""
    asked = decode(_rerank, body)
    if not asked.query:
        raise _bad("query", "is required")
    if not asked.documents:
        raise _bad("documents", "is required: a list of texts, or of objects with `text`")
    for i, document in enumerate(asked.documents):
        if isinstance(document, dict) and not isinstance(document.get("text"), str):
            raise _bad(f"documents[{i}].text", "is required: a text")
    if asked.top_n is not None:
        _check_range("top_n", asked.top_n, 1, None)
    if asked.rank_fields is not None:
        raise _bad("rank_fields", "is not supported; send each document's text as it is to be ranked")
    if asked.return_embeddings:
        raise _bad("return_embeddings", "cannot be true: use /v1/embeddings")
    return asked


def check_images(messages: Sequence[Message]) -> None:
    """Images come with the request: an engine that fetched any address would be a way into the node's network, and
    file: one to its disk."""
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if part.type == "image_url" and (part.image_url is None or part.image_url.url[:5].lower() != "data:"):
                where = f"messages[{i}].content[{j}].image_url.url"
                raise _bad(where, "must be a data: URL: this node fetches no images (`fetch_images` in neuron.toml)")


def called_function(chat: ChatRequest) -> str | None:
    """The function that `tool_choice` names."""
    choice = chat.tool_choice
    return choice.function.name if isinstance(choice, NamedTool) and choice.function is not None else None


def text_of(document: str | dict[str, Any]) -> str:
    """A document to rank as its text."""
    return document if isinstance(document, str) else str(document["text"])


def part_kinds(messages: Sequence[Message]) -> dict[str, str]:
    """The kinds of content parts that are not text -> where the first of each stands."""
    kinds: dict[str, str] = {}
    for i, message in enumerate(messages):
        if type(message.content) is list:
            for j, part in enumerate(message.content):
                if part.type != "text":
                    kinds.setdefault(part.type, f"messages[{i}].content[{j}]")
    return kinds


def _bad(param: str, what: str) -> BadRequest:
    return BadRequest(f"`{param}` {what}.", param=param)


def _check_content(message: Message, i: int) -> None:
    content = message.content
    if content is UNSET or content is None:
        # Absent beside tool calls is what every agent sends in its second turn.
        if content is UNSET and message.role != "assistant":
            raise _bad(f"messages[{i}].content", "is required")
        return
    if isinstance(content, list):
        for j, part in enumerate(content):
            if not part.type:
                raise _bad(f"messages[{i}].content[{j}].type", "is required")
            if part.type == "text" and part.text is None:
                raise _bad(f"messages[{i}].content[{j}].text", "is required")


def _check_tool_calls(calls: Sequence[ToolCall], i: int) -> None:
    for j, call in enumerate(calls):
        if call.function is None or not call.function.name:
            raise _bad(f"messages[{i}].tool_calls[{j}].function.name", "is required")


def _check_generation(asked: Generation, max_choices: int, context: int) -> None:
    """HOT: nearly all of it is None."""
    if asked.n is not None and not 1 <= asked.n <= max_choices:
        raise _bad("n", f"must be 1 to {max_choices} (one for each slot of this model), not {asked.n}")
    _check_limit("max_tokens", asked.max_tokens)
    if asked.temperature is not None:
        _check_range("temperature", asked.temperature, 0, None)
    if asked.top_p is not None:
        _check_range("top_p", asked.top_p, 0, 1)
    if asked.presence_penalty is not None:
        _check_range("presence_penalty", asked.presence_penalty, -2, 2)
    if asked.frequency_penalty is not None:
        _check_range("frequency_penalty", asked.frequency_penalty, -2, 2)
    if asked.stop is not None:
        if len(asked.stops) > MAX_STOPS:
            raise _bad("stop", f"can have {MAX_STOPS} strings, not {len(asked.stops)}")
        if "" in asked.stops:
            raise _bad("stop", "cannot have an empty string")
    if isinstance(asked.logit_bias, dict):
        for token, bias in asked.logit_bias.items():
            if not -_BIAS <= bias <= _BIAS:
                raise _bad(f"logit_bias.{token}", f"must be {-_BIAS:g} to {_BIAS:g}, not {bias:g}")
    if asked.response_format is not None:
        _check_response_format(asked.response_format)
    for name in ("repeat_last_n", "dry_penalty_last_n"):
        # A window of 2^31 tokens was allocated, and filled, for every sampler: all slots stood still for a minute.
        if (window := getattr(asked, name)) is not None and window > context:
            raise _bad(name, f"must be at most the context of {context} tokens, not {window}")
    if asked.n_probs is not None:
        _check_range("n_probs", asked.n_probs, 0, MAX_TOP_LOGPROBS)
    if asked.n_cmpl is not None:
        raise _bad("n_cmpl", "is the engine's name; use `n`")
    if asked.grammar and asked.wants_json:
        raise _bad("grammar", "and a JSON schema exclude each other; send one")


def _check_response_format(asked: ResponseFormat) -> None:
    if asked.type not in ("text", "json_object", "json_schema"):
        raise _bad("response_format.type", f"{asked.type!r} is not known; use text, json_object or json_schema")
    if asked.type == "json_schema" and (asked.json_schema is None or asked.json_schema.schema is None):
        raise _bad("response_format.json_schema.schema", "is required with type json_schema")


def _check_tools(tools: Sequence[Tool]) -> None:
    for i, tool in enumerate(tools):
        if tool.type != "function":
            raise _bad(f"tools[{i}].type", f"{tool.type!r} is not supported; only function is")
        if tool.function is None or not tool.function.name:
            raise _bad(f"tools[{i}].function.name", "is required")
        if not _NAME.fullmatch(tool.function.name):
            raise _bad(f"tools[{i}].function.name", "can have letters, digits and _ . : / - only, at most 128")
        parameters = tool.function.schema
        if parameters and parameters.get("type", "object") != "object":
            raise _bad(f"tools[{i}].function.parameters.type", f"must be object, not {parameters['type']!r}")


def _check_tool_choice(chat: ChatRequest) -> None:
    choice = chat.tool_choice
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise _bad("tool_choice", f"{choice!r} is not known; use auto, none, required or a named function")
        if choice == "required" and not chat.tools:
            raise _bad("tool_choice", "required needs `tools`")
        return
    if choice is not None:
        name = choice.function.name if choice.function is not None else ""
        if choice.type != "function" or not name:
            raise _bad("tool_choice", 'must be {"type": "function", "function": {"name": ...}} to name a function')
        names = [t.function.name for t in chat.tools or () if t.function is not None]
        if name not in names:
            raise _bad("tool_choice.function.name", f"{name!r} is not in `tools` ({', '.join(names) or 'none given'})")


def _check_texts_or_tokens(param: str, items: Sequence[Any]) -> None:
    """A list of texts, of token ids, or of lists of token ids; not empty, not mixed."""
    kinds = {type(item) for item in items}
    if kinds == {int}:
        _check_tokens(param, items)
        return
    if len(items) > MAX_PROMPTS:
        raise _bad(param, f"can have {MAX_PROMPTS} items, not {len(items)}")
    for i, item in enumerate(items):
        if isinstance(item, list) and len(kinds) == 1 and item and all(type(token) is int for token in item):
            _check_tokens(f"{param}[{i}]", item)
        elif not isinstance(item, str) or len(kinds) > 1:
            raise _bad(f"{param}[{i}]", "must be a text or a list of token ids, the same kind throughout")


def _check_tokens(param: str, tokens: Sequence[int]) -> None:
    if min(tokens) < 0 or max(tokens) >= 1 << 31:  # more is cut to 32 bits by the engine: another token
        raise _bad(param, "has a number that is no token id")


def _check_limit(param: str, value: int | None) -> None:
    # -1 is llama.cpp's and Ollama's "until the model ends"; several clients send it.
    if value is not None and value < 1 and value != -1:
        raise _bad(param, f"must be at least 1, not {value}; leave it out for no limit")


def _check_range(param: str, value: float, low: float, high: float | None) -> None:
    if value < low or (high is not None and value > high):
        bounds = f"{low:g} to {high:g}" if high is not None else f"at least {low:g}"
        raise _bad(param, f"must be {bounds}, not {value:g}")
