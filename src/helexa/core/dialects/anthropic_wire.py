"""Anthropic's Messages request as it comes over the wire, and what of it we know. Wire types and lists only.

Lenient where clients differ (every field of a block is optional here, and judged by its block's type later), strict
about types: a number where a text belongs is refused while decoding, with its path.

Three lists, held to docs/reference/anthropic.md by a test: what is honoured; what is known and not supported (dropped
and named in `x-helexa-dropped`, or refused); whatever stands on neither is unknown and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from helexa.core.bodies import MAX_MESSAGES, MAX_TOOLS


class Source(msgspec.Struct):
    """Of an image or a document."""

    type: str = ""  # base64 | url | text | content | file
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    content: str | list[Block] | None = None


class Block(msgspec.Struct):
    """One content block of any type. input is kept as it came: a call's numbers are the client's."""

    type: str = ""
    text: str | None = None
    source: Source | str | None = None  # a text for search_result
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw()
    tool_use_id: str | None = None
    content: str | list[Block] | dict[str, Any] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None
    title: str | None = None
    context: str | None = None
    citations: Any = None
    transformations: Any = None


class Message(msgspec.Struct):
    role: str = ""
    content: str | list[Block] | msgspec.UnsetType = msgspec.UNSET


class Tool(msgspec.Struct):
    type: str | None = None  # absent or "custom": a function of the client's
    name: str | None = None
    description: str | None = None
    input_schema: msgspec.Raw = msgspec.Raw()
    strict: bool | None = None
    input_examples: list[Any] | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None


class ToolChoice(msgspec.Struct):
    type: str = ""
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    type: str = ""
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(msgspec.Struct):
    type: str = ""
    schema: msgspec.Raw = msgspec.Raw()


class OutputConfig(msgspec.Struct):
    effort: str | None = None
    format: OutputFormat | None = None
    task_budget: Any = None


class Keep(msgspec.Struct):
    type: str = ""
    value: int | None = None


class Edit(msgspec.Struct):
    type: str = ""
    keep: Keep | str | None = None


class ContextManagement(msgspec.Struct):
    edits: list[Edit] | None = None


class Metadata(msgspec.Struct):
    user_id: str | None = None


class Request(msgspec.Struct):
    model: str | None = None
    messages: Annotated[list[Message], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    max_tokens: int | None = None
    system: str | list[Block] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    context_management: ContextManagement | None = None
    metadata: Metadata | None = None
    # known and not supported; any type will do
    container: Any = None
    mcp_servers: Any = None
    service_tier: Any = None
    inference_geo: Any = None
    speed: Any = None
    compaction: Any = None
    thread: Any = None
    fallbacks: Any = None
    fallback_credit_token: Any = None
    billing_policy: Any = None
    diagnostics: Any = None


HONOURED: Final = frozenset(
    {
        "model",
        "messages",
        "max_tokens",
        "system",
        "stream",
        "temperature",
        "top_p",
        "top_k",
        "stop_sequences",
        "tools",
        "tool_choice",
        "thinking",
        "output_config",
        "output_format",
        "context_management",
        "metadata",
        "cache_control",  # everywhere: the prompt cache needs no marks, and hits are told in `usage`
    }
)

# Dropped and named: the answer is a good one without them.
DROPPED: Final = (
    "container",
    "mcp_servers",
    "service_tier",
    "inference_geo",
    "speed",
    "fallbacks",
    "fallback_credit_token",
    "billing_policy",
    "diagnostics",
)
# What such a field says when it asks for nothing out of the ordinary.
ORDINARY: Final[dict[str, tuple[Any, ...]]] = {
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "mcp_servers": ([],),
    "fallbacks": ([],),
}
# Refused: the answer would be another one than was asked for.
REFUSED: Final = ("compaction", "thread")

BLOCKS: Final = frozenset(
    {
        "text",
        "image",
        "document",
        "search_result",
        "tool_use",
        "tool_result",
        "thinking",
    }
)
# Traces of what ran on Anthropic's servers in earlier turns: dropped and named.
DROPPED_BLOCKS: Final = frozenset(
    {
        "redacted_thinking",
        "server_tool_use",
        "web_search_tool_result",
        "web_fetch_tool_result",
        "code_execution_tool_result",
        "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result",
        "tool_search_tool_result",
        "advisor_tool_result",
        "mcp_tool_use",
        "mcp_tool_result",
        "tool_reference",
        "container_upload",
        "fallback",
    }
)
