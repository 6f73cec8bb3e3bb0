"""OpenAI's Responses request as it comes over the wire, and what of it we know. Wire types and lists only.

Lenient where clients differ (every field of an item is optional here, and judged by its item's type later), strict
about types: a number where a text belongs is refused while decoding, with its path.

Three lists, held to docs/reference/responses.md by a test: what is honoured; what is known and not supported (dropped
and named in `x-helexa-dropped`, or refused); whatever stands on neither is unknown and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from helexa.core.bodies import MAX_MESSAGES, MAX_TOOLS

_MOST_TOOLS: Final = msgspec.Meta(max_length=MAX_TOOLS)


class Part(msgspec.Struct):
    """One content part of any type."""

    type: str = ""
    text: str | None = None
    refusal: str | None = None
    image_url: str | dict[str, Any] | None = None
    detail: str | None = None
    file_id: str | None = None
    file_url: str | None = None
    file_data: str | None = None
    filename: str | None = None


class Format(msgspec.Struct):
    """Of a custom tool's input."""

    type: str = ""
    syntax: str | None = None
    definition: str | None = None


class Tool(msgspec.Struct):
    type: str = ""
    name: str | None = None
    description: str | None = None
    parameters: msgspec.Raw = msgspec.Raw()
    strict: bool | None = None
    format: Format | None = None
    tools: Annotated[list[Tool], _MOST_TOOLS] | None = None  # of a namespace
    server_label: str | None = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    output_schema: Any = None


class Item(msgspec.Struct):
    """One item of the input, of any type."""

    type: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | list[Part] | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | dict[str, Any] | None = None  # an object for tool_search_call
    input: str | None = None
    output: str | list[Part] | dict[str, Any] | None = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None
    tools: Annotated[list[Tool], _MOST_TOOLS] | None = None  # of additional_tools


class ToolChoice(msgspec.Struct):
    type: str = ""
    name: str | None = None
    namespace: str | None = None
    mode: str | None = None
    tools: Annotated[list[ToolChoice], _MOST_TOOLS] | None = None


class TextFormat(msgspec.Struct):
    type: str = ""
    name: str | None = None
    description: str | None = None
    schema: msgspec.Raw = msgspec.Raw()
    strict: bool | None = None


class Text(msgspec.Struct):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None  # the deprecated name of `summary`
    context: str | None = None
    mode: str | None = None


class StreamOptions(msgspec.Struct):
    include_obfuscation: bool | None = None


class Request(msgspec.Struct):
    model: str | None = None
    input: str | Annotated[list[Item], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    instructions: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    max_output_tokens: int | None = None
    tools: Annotated[list[Tool], _MOST_TOOLS] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    truncation: str | None = None
    background: bool | None = None
    # known and not supported; any type will do
    conversation: Any = None
    prompt: Any = None
    moderation: Any = None
    max_tool_calls: Any = None
    context_management: Any = None
    client_metadata: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    background_options: Any = None
    access_programs: Any = None
    image: Any = None


HONOURED: Final = frozenset(
    {
        "model",
        "input",
        "instructions",
        "stream",
        "temperature",
        "top_p",
        "top_logprobs",
        "max_output_tokens",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "text",
        "reasoning",
        "include",
        "store",
        "previous_response_id",
        "metadata",
        "user",
        "safety_identifier",
        "prompt_cache_key",
    }
)
# Dropped and named: the answer is a good one without them.
DROPPED: Final = (
    "truncation",
    "service_tier",
    "max_tool_calls",
    "context_management",
    "client_metadata",
    "prompt_cache_options",
    "prompt_cache_retention",
    "background_options",
    "access_programs",
    "image",
    "stream_options",
)
# What such a field says when it asks for nothing out of the ordinary.
ORDINARY: Final[dict[str, tuple[Any, ...]]] = {
    "truncation": ("disabled",),
    "service_tier": ("auto", "default"),
    "context_management": ([],),
    "client_metadata": ({},),
    "stream_options": (StreamOptions(), StreamOptions(include_obfuscation=False)),
}
# Refused: the answer would be another one than was asked for.
REFUSED: Final = ("background", "conversation", "prompt", "moderation")

ITEMS: Final = frozenset(
    {
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "reasoning",
        "item_reference",
        "additional_tools",
    }
)
# Traces of what ran on OpenAI's servers, or of tools that only its own models know: dropped and named.
DROPPED_ITEMS: Final = frozenset(
    {
        "apply_patch_call",
        "apply_patch_call_output",
        "code_interpreter_call",
        "compaction",
        "computer_call",
        "computer_call_output",
        "configuration_update",
        "file_search_call",
        "image_generation_call",
        "local_shell_call",
        "local_shell_call_output",
        "mcp_approval_request",
        "mcp_approval_response",
        "mcp_call",
        "mcp_list_tools",
        "program",
        "program_output",
        "shell_call",
        "shell_call_output",
        "tool_search_call",
        "tool_search_output",
        "web_search_call",
    }
)
INCLUDED: Final = frozenset(
    {"reasoning.encrypted_content", "message.output_text.logprobs", "message.input_image.image_url"}
)
