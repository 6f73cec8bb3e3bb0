"""What a body asks of the engine: sampling, limits, grammar. Pure.

openai_fields judges what all harnesses share; here stands what this engine's samplers take beside, in the spelling of
the clients that send it, and what it cannot honour, which is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from helexa.core.bodies import decode
from helexa.core.errors import BadRequest
from helexa.neuron.harness import openai_fields as fields
from helexa.neuron.harness.torch.request import Grammar, Sampling

Number = float | None


class Samplers(msgspec.Struct):
    """The fields of local clients that openai_fields does not name."""

    top_k: int | None = None
    min_p: Number = None
    repeat_penalty: Number = None  # llama.cpp's and Ollama's name
    repetition_penalty: Number = None  # transformers' and vLLM's
    ignore_eos: bool | None = None
    thinking_budget_tokens: int | None = None
    # Samplers of llama.cpp that are not here: refused where they would do something.
    typical_p: Number = None
    mirostat: int | None = None
    dry_multiplier: Number = None
    xtc_probability: Number = None
    dynatemp_range: Number = None
    top_n_sigma: Number = None


_IDLE: Final[dict[str, tuple[float, ...]]] = {
    "typical_p": (1.0,),
    "mirostat": (0,),
    "dry_multiplier": (0.0,),
    "xtc_probability": (0.0,),
    "dynatemp_range": (0.0,),
    "top_n_sigma": (-1.0, 0.0),
}
_samplers: Final = msgspec.json.Decoder(Samplers)


class Defaults(msgspec.Struct, frozen=True):
    """How a model's makers want it sampled (generation_config.json), where a request does not say."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_samplers(body: bytes) -> Samplers:
    """Raises BadRequest with `param`."""
    asked = decode(_samplers, body)
    _check("top_k", asked.top_k, -1, None)
    _check("min_p", asked.min_p, 0, 1)
    for name in ("repeat_penalty", "repetition_penalty"):
        value = getattr(asked, name)
        if value is not None and not 0 < value <= 100:
            raise BadRequest(f"`{name}` must be over 0 and at most 100, not {value:g}.", param=name)
    for name, idle in _IDLE.items():
        value = getattr(asked, name)
        if value is not None and value not in idle:
            raise BadRequest(f"`{name}` is not supported by this model's engine (torch); leave it out.", param=name)
    if asked.thinking_budget_tokens is not None and asked.thinking_budget_tokens > 0:
        raise BadRequest(
            "`thinking_budget_tokens` can only be 0 (no thoughts) or -1 here: this engine does not cut them.",
            param="thinking_budget_tokens",
        )
    return asked


def sampling(asked: fields.Generation, samplers: Samplers, defaults: Defaults, *, vocabulary: int) -> Sampling:
    penalty = samplers.repeat_penalty if samplers.repeat_penalty is not None else samplers.repetition_penalty
    if asked.repeat_last_n == 0:  # over no token; any other window is all of prompt and answer here
        penalty = 1.0
    return Sampling(
        temperature=_or(asked.temperature, defaults.temperature),
        top_k=max(0, int(_or(samplers.top_k, defaults.top_k))),
        top_p=_or(asked.top_p, defaults.top_p),
        min_p=_or(samplers.min_p, defaults.min_p),
        repetition_penalty=_or(penalty, defaults.repetition_penalty),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=_bias(asked.logit_bias, vocabulary),
        seed=_seed(asked.seed),
    )


def _seed(seed: int | None) -> int | None:
    """-1 is llama.cpp's and several clients' word for "any"."""
    return None if seed is None or seed == -1 else seed & 0xFFFFFFFFFFFFFFFF


def _or(asked: float | None, default: float) -> float:
    return default if asked is None else asked


def _bias(asked: Mapping[str, float] | list[Any] | None, vocabulary: int) -> dict[int, float]:
    """OpenAI's {"id": bias}, or llama.cpp's [[id, bias], ...], where false forbids a token."""
    if not asked:
        return {}
    pairs = asked.items() if isinstance(asked, Mapping) else asked
    found: dict[int, float] = {}
    for pair in pairs:
        try:
            token, bias = pair
            number = int(token)
            found[number] = -100.0 if bias is False else float(bias)
        except (TypeError, ValueError):
            raise BadRequest(
                f'`logit_bias` must be token ids with a number each ({{"42": -100}}), not {pair!r}.', param="logit_bias"
            ) from None
        if not 0 <= number < vocabulary:
            raise BadRequest(
                f"`logit_bias` has {number}, where token ids are 0 to {vocabulary - 1}.", param="logit_bias"
            )
    return found


def most_tokens(asked: fields.ChatRequest | fields.CompletionRequest) -> int | None:
    """How long the answer may be; None: to the end of the context."""
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    return None if most is None or most < 0 else most


def grammar(asked: fields.Generation) -> Grammar | None:
    """What binds the answer. Raises BadRequest."""
    if asked.grammar:
        return Grammar("lark", lark(asked.grammar), "grammar")
    if not asked.wants_json:
        return None
    schema = asked.wanted_schema
    param = "json_schema" if asked.json_schema is not None else "response_format"
    if schema is None or schema is True:
        return Grammar("json_object", param=param)
    return Grammar("json_schema", msgspec.json.encode(schema).decode(), param)


def lark(text: str) -> str:
    """A grammar in llama.cpp's form (GBNF, as all clients of this field send it) in llguidance's."""
    if text.lstrip().startswith("%llguidance"):
        return text
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        found: str = any_to_lark(text)
    except Exception as err:
        raise BadRequest(f"`grammar` is not understood: {err}.", param="grammar") from err
    return found


def _check(name: str, value: float | None, low: float, high: float | None) -> None:
    if value is not None and (value < low or (high is not None and value > high)):
        bounds = f"{low:g} to {high:g}" if high is not None else f"at least {low:g}"
        raise BadRequest(f"`{name}` must be {bounds}, not {value:g}.", param=name)
