"""LangChain and Pydantic AI with real tools, through chat completions and through Messages: one line of JSON a run.
In: GATEWAY, MODEL and, as the working directory, the folder for the files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic_ai import Agent, ModelRetry
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

GATEWAY, MODEL = os.environ["GATEWAY"], os.environ["MODEL"]
PROMPT = "Write a greeting."


def read(path: str) -> str:
    """Reads a file."""
    return Path(path).read_text()


def write(path: str, content: str) -> str:
    """Writes a file."""
    Path(path).write_text(content)
    return "written"


def langchain(model: Any) -> dict[str, Any]:
    tools = {made.name: made for made in (tool(read), tool(write))}
    bound = model.bind_tools(list(tools.values()))
    messages: list[Any] = [HumanMessage(PROMPT)]
    calls: list[str] = []
    errors = 0
    while True:
        answer = bound.invoke(messages)
        messages.append(answer)
        if not answer.tool_calls:
            break
        for call in answer.tool_calls:
            calls.append(call["name"])
            try:
                said, status = tools[call["name"]].invoke(call["args"]), "success"
            except OSError as err:
                said, status = str(err), "error"
                errors += 1
            messages.append(ToolMessage(said, tool_call_id=call["id"], status=status))
    streamed = "".join(str(piece.text) for piece in bound.stream(messages[:-1]))
    cached = answer.usage_metadata["input_token_details"]["cache_read"]
    return {"text": str(answer.text), "streamed": streamed, "calls": calls, "errors": errors, "cached": cached}


def pydantic_ai(model: Any) -> dict[str, Any]:
    calls: list[str] = []
    errors = 0

    def telling(does: Callable[..., str]) -> Callable[..., str]:
        def reading(path: str) -> str:
            nonlocal errors
            calls.append("read")
            try:
                return does(path)
            except OSError as err:
                errors += 1
                raise ModelRetry(str(err)) from err

        def writing(path: str, content: str) -> str:
            calls.append("write")
            return does(path, content)

        made = reading if does is read else writing
        made.__name__, made.__doc__ = does.__name__, does.__doc__
        return made

    result = Agent(model, tools=[telling(read), telling(write)]).run_sync(PROMPT)
    with Agent(model).run_stream_sync("A title, please.") as stream:
        streamed = "".join(stream.stream_text(delta=True))
    cached = result.usage.cache_read_tokens
    return {"text": result.output, "streamed": streamed, "calls": calls, "errors": errors, "cached": cached}


def main() -> None:
    openai = {"base_url": f"{GATEWAY}/v1", "api_key": "none"}
    anthropic = {"base_url": GATEWAY, "api_key": "none"}
    runs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("langchain-openai", lambda: langchain(ChatOpenAI(model=MODEL, max_retries=0, **openai))),
        ("langchain-anthropic", lambda: langchain(ChatAnthropic(model=MODEL, max_retries=0, **anthropic))),
        ("pydantic-ai-openai", lambda: pydantic_ai(OpenAIChatModel(MODEL, provider=OpenAIProvider(**openai)))),
        ("pydantic-ai-anthropic", lambda: pydantic_ai(AnthropicModel(MODEL, provider=AnthropicProvider(**anthropic)))),
    ]
    for name, run in runs:
        Path("greeting.txt").unlink(missing_ok=True)
        said = run()
        print(json.dumps({"client": name, **said, "file": read("greeting.txt")}), flush=True)


main()
