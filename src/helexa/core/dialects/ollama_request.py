"""Ollama's requests as the neuron's. Pure: bytes in, bytes out.

A chat, and a prompt that goes through the model's template, are a chat body; a raw prompt and one with a suffix are a
completion; inputs to embed are an embedding request. A request without a prompt only wants the model loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from helexa.core.bodies import decode
from helexa.core.dialects import ollama_wire as wire
from helexa.core.dialects.neuron_request import MAX_TOKENS, ChatBody
from helexa.core.dialects.ollama_messages import bad, content, messages

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"

_EFFORTS: Final = {"low": "low", "medium": "medium", "high": "high", "max": "high"}
_ZERO: Final = frozenset({"0", "0s", "0m", "0h", "0ms"})
_JSON: Final = '"json"'
_NO_FORMAT: Final = ("", '""', "null")
# The chat body's fields as an Ollama client knows them, for errors that a node names them in.
_NAMES: Final = {
    "response_format": "format",
    "reasoning_effort": "think",
    "max_tokens": "options.num_predict",
    "stop": "options.stop",
    **{name: f"options.{name}" for name in (*wire.SAMPLING, *wire.SAMPLING_WHOLE)},
}
_chat = msgspec.json.Decoder(wire.Chat)
_generate = msgspec.json.Decoder(wire.Generate)
_embed = msgspec.json.Decoder(wire.Embed)
_embeddings = msgspec.json.Decoder(wire.Embeddings)
_encode = msgspec.json.Encoder().encode


def naming(param: str) -> str:
    """For node_errors."""
    return _NAMES.get(param, param)


@dataclass(frozen=True, slots=True)
class Translation(ChatBody):
    """path:    what the node is asked
    num_ctx: the context that the client counts on, if it said so
    plain:   for a model without a chat template: the same request as a completion; None where there is none
    system:  the prompt has a system part, which only a template could place
    load:    there is nothing to generate: the model is to be loaded ("load"), or was wanted gone ("unload")
    """

    path: str = CHAT
    num_ctx: int | None = None
    plain: bytes | None = None
    system: bool = False
    load: str | None = None

    def check_context(self, model: str, context: int | None) -> None:
        """Raises BadRequest where the model has less than the client counts on: its prompt would not be read whole."""
        if self.num_ctx is not None and context is not None and self.num_ctx > context:
            raise bad(
                "options.num_ctx",
                f"is {self.num_ctx}, and {model} has a context of {context} tokens here; ask for no more, or have it "
                "loaded with more (`context` in models.toml)",
            )

    def as_completion(self, model: str, served_as: str) -> bytes:
        """The body for a model without a template. Raises BadRequest where that cannot say what was asked."""
        assert self.plain is not None
        if self.system:
            raise bad("system", f"needs a chat template, and {served_as} has none; put it into the prompt")
        return b'{"model":' + _encode(model) + self.plain


def chat(body: bytes) -> Translation:
    """POST /api/chat. Raises BadRequest, naming the field in `param`."""
    asked = decode(_chat, body)
    made = _Body(asked, "/api/chat")
    told = messages(asked.messages or ())
    fields: dict[str, Any] = {"messages": told}
    if asked.tools:
        fields["tools"] = asked.tools
    fields |= made.generation() | made.for_chat()
    return made.translation(fields, load=_load(asked, empty=not told))


def generate(body: bytes) -> Translation:
    """POST /api/generate. Raises BadRequest, naming the field in `param`.

    1. `raw`: the prompt as it is. 2. A suffix: the model fills in what stands between. 3. Else the prompt is a user's
    message, behind the system's; a model without a template gets it as it is.
    """
    asked = decode(_generate, body)
    made = _Body(asked, "/api/generate")
    prompt = asked.prompt or ""
    load = _load(asked, empty=not (prompt or asked.suffix or asked.images))
    generation = made.generation()
    if asked.raw or asked.suffix:  # 1, 2
        mode = "raw" if asked.raw else "suffix"
        for name in ("system", "images"):
            if getattr(asked, name):
                raise bad(name, f"cannot go with `{mode}`: there is no template to place it")
        fields: dict[str, Any] = {"prompt": prompt}
        if asked.suffix:
            fields["suffix"] = asked.suffix
        made.drop_for_completion()
        return made.translation(fields | generation, path=COMPLETIONS, load=load)
    told: list[dict[str, Any]] = []  # 3
    if asked.system:
        told.append({"role": "system", "content": asked.system})
    told.append({"role": "user", "content": content(prompt, asked.images)})
    plain = None if asked.images else _fields({"prompt": prompt} | generation)
    return made.translation(
        {"messages": told} | generation | made.for_chat(), load=load, plain=plain, system=bool(asked.system)
    )


def embed(body: bytes) -> Translation:
    """POST /api/embed. Raises BadRequest, naming the field in `param`."""
    asked = decode(_embed, body)
    dropped = _dropped(asked, "/api/embed")
    fields: dict[str, Any] = {"input": asked.input}
    if asked.dimensions is not None:
        fields["dimensions"] = asked.dimensions
    load = _load(asked, empty=not asked.input)
    return Translation(_fields(fields), tuple(dropped), path="/v1/embeddings", load=load)


def embeddings(body: bytes) -> Translation:
    """POST /api/embeddings: one text. Raises BadRequest, naming the field in `param`."""
    asked = decode(_embeddings, body)
    dropped = _dropped(asked, "/api/embeddings")
    load = _load(asked, empty=not asked.prompt)
    return Translation(_fields({"input": asked.prompt}), tuple(dropped), path="/v1/embeddings", load=load)


class _Body:
    """What chat and generate have in common; used once."""

    def __init__(self, asked: wire.Generation, path: str) -> None:
        self._asked = asked
        self._options = asked.options or wire.Options()
        for name in wire.REFUSED.get(path, ()):
            if getattr(asked, name) not in wire.EMPTY:
                raise bad(name, "is not supported here; leave it out")
        self._dropped = _dropped(asked, path)
        for name in wire.DROPPED_OPTIONS:
            if getattr(self._options, name) is not None:
                self._dropped.append(f"options.{name}")

    def generation(self) -> dict[str, Any]:
        """The fields that a chat and a completion call alike."""
        options = self._options
        made: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        for name in wire.SAMPLING:
            if (value := getattr(options, name)) is not None:
                made[name] = value
        for name in wire.SAMPLING_WHOLE:
            if (value := _whole(options, name)) is not None:
                made[name] = value
        limit = _whole(options, "num_predict")
        if limit is not None and limit > 0:  # 0, -1 and -2: until the model ends, or the context does
            made["max_tokens"] = min(limit, MAX_TOKENS)
        if stops := [options.stop] if isinstance(options.stop, str) else options.stop:
            made["stop"] = stops
        if (wanted := _format(self._asked.format)) is not None:
            made["response_format"] = wanted
        return made

    def for_chat(self) -> dict[str, Any]:
        """What only a chat has: log-probabilities with their tokens, and the template's reasoning switch."""
        asked, made = self._asked, dict[str, Any]()
        if asked.logprobs:
            made["logprobs"] = True
            if asked.top_logprobs:
                made["top_logprobs"] = asked.top_logprobs
        elif asked.top_logprobs:
            raise bad("top_logprobs", "needs `logprobs: true`")
        think = asked.think
        if think is None or think == "":
            return made
        if isinstance(think, str):
            if think not in _EFFORTS:
                raise bad("think", f"{think!r} is not known; use true, false, low, medium or high")
            made["reasoning_effort"] = _EFFORTS[think]
        made["chat_template_kwargs"] = {"enable_thinking": bool(think)}
        return made

    def drop_for_completion(self) -> None:
        for name in ("think", "logprobs", "top_logprobs"):
            if getattr(self._asked, name):
                self._dropped.append(name)

    def translation(
        self,
        fields: dict[str, Any],
        *,
        load: str | None,
        path: str = CHAT,
        plain: bytes | None = None,
        system: bool = False,
    ) -> Translation:
        context = _whole(self._options, "num_ctx")
        return Translation(
            _fields(fields), tuple(self._dropped), path=path, num_ctx=context, plain=plain, system=system, load=load
        )


def _fields(made: dict[str, Any]) -> bytes:
    return b"," + _encode(made)[1:]


def _dropped(asked: msgspec.Struct, path: str) -> list[str]:
    return [
        name
        for name in wire.DROPPED[path]
        if (value := getattr(asked, name)) is not None and value not in wire.ORDINARY.get(name, ())
    ]


def _load(asked: wire.Generation | wire.Embed | wire.Embeddings, *, empty: bool) -> str | None:
    if not empty:
        return None
    keep = asked.keep_alive
    is_zero = keep in _ZERO if isinstance(keep, str) else keep == 0 and keep is not False
    return "unload" if is_zero else "load"


def _whole(options: wire.Options, name: str) -> int | None:
    value = getattr(options, name)
    if value is None:
        return None
    if value != int(value):
        raise bad(f"options.{name}", f"must be a whole number, not {value:g}")
    return int(value)


def _format(raw: msgspec.Raw) -> dict[str, Any] | None:
    text = bytes(raw).decode("utf-8", "replace")
    if text in _NO_FORMAT:
        return None
    if text == _JSON:
        return {"type": "json_object"}
    if not text.startswith("{"):
        raise bad("format", 'must be "json" or a JSON schema')
    return {"type": "json_schema", "json_schema": {"name": "format", "schema": raw, "strict": True}}
