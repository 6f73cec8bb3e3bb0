"""Requests as a Director sees them, and a llama session to prepare them, without a socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from helexa.core.errors import Dialect
from helexa.core.lifecycle import Estimate, LoadRequest
from helexa.core.relay.contract import Endpoint, Exchange
from helexa.neuron.harness.base import ModelFacts, ModelFiles, Plan
from helexa.neuron.harness.llama.session import LlamaSession

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def exchange(body: bytes | dict[str, Any], path: str = CHAT, *, gateway_usage: bool = False) -> Exchange:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    try:
        asked = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        asked = {}
    asked = asked if isinstance(asked, dict) else {}
    options = asked.get("stream_options")
    return Exchange(
        endpoint=Endpoint(path, Dialect.OPENAI, path),
        head=b"",
        body=raw,
        model="m",
        stream=asked.get("stream") is True,
        wants_usage=isinstance(options, dict) and options.get("include_usage") is True,
        gateway_usage=gateway_usage,
        request_id="r1",
        client="127.0.0.1",
        t_start=0.0,
    )


def session(
    task: str = "chat",
    *,
    abilities: tuple[str, ...] = ("chat",),
    slots: int = 4,
    extra: dict[str, Any] | None = None,
    **profile: Any,
) -> LlamaSession:
    """profile: fields of the load request"""
    facts = ModelFacts("llama", task, 8192, 1, 1, "Q4_1", abilities, extra or {})
    request = LoadRequest(model_id="smol", **profile)
    return LlamaSession(Plan(request, ModelFiles("smol", (Path("m"),)), facts, Estimate(devices=[]), 2048, slots, (0,)))
