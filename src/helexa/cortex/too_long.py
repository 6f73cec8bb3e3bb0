"""Prompts that cannot fit their model's context are refused before anything is loaded for them, where it can be known.

Only a tokenizer can tell: no number of bytes is a number of tokens, and a body holds more than its prompt. A node that
has the model's file counts without loading it. It is asked only about bodies so large that they may be too long; what
it cannot count is left to the engine, which refuses what does not fit and cuts nothing.
"""

from __future__ import annotations

from random import Random
from typing import Final

import msgspec

from helexa.core.catalogue import ModelProfile
from helexa.core.errors import ContextLengthExceeded
from helexa.cortex import counting
from helexa.cortex.fleet import Fleet

LEAST_BYTES: Final = 2  # a token, below which a prompt is taken to fit: text in any script has more
COUNT_S: Final = 10.0
_STEP: Final = 256  # engines round a context up to this


class _Counted(msgspec.Struct):
    input_tokens: int


def may_be_too_long(body: bytes, context: int) -> bool:
    return len(body) >= LEAST_BYTES * context


def context_of(profile: ModelProfile | None, trained: int | None) -> int | None:
    """Tokens that a request may have at most once the model is loaded; None where nobody knows."""
    if profile is not None and profile.context is not None:
        return -(-profile.context // _STEP) * _STEP
    return trained


async def check(fleet: Fleet, model_id: str, body: bytes, rng: Random) -> None:
    """body: of a chat. Raises ContextLengthExceeded; whatever stands in the way of knowing is no refusal."""
    meta = fleet.entry(model_id).get("meta", {})
    context = context_of(fleet.profiles.get(model_id), meta.get("n_ctx_train"))
    # "profile" is our own word to the node: a body that has it too is not passed on with ours
    if context is None or not may_be_too_long(body, context) or body[:1] != b"{" or b'"profile"' in body:
        return
    found = counting.choose(fleet, model_id, [], [], rng)
    if found is None:
        return
    replica, profile = found
    asked = body if profile is None else counting.with_profile(body, profile)
    headers = {"content-type": "application/json", "x-helexa-model": replica.info.id}
    try:
        answer = await replica.node.upstream.fetch("POST", counting.PATH, asked, headers=headers, timeout_s=COUNT_S)
        if answer.status != 200:
            return
        tokens = msgspec.json.decode(answer.body, type=_Counted).input_tokens
    except (OSError, TimeoutError, ValueError):  # msgspec's own among the last
        return
    if tokens > context:
        raise ContextLengthExceeded(model_id, tokens, context)
