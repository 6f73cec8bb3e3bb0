"""A model folder's JSON files made one ModelConfig. Imports no torch.

What a family has that its config.json does not say stands in a table here. What the description cannot express, and
what would change an answer, is refused by name before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from helexa.neuron.harness.torch.config import FIRST, LAST, MEAN, Experts, Layer, ModelConfig, Rope, Unsupported

SLIDING: Final = "sliding_attention"
FULL: Final = "full_attention"


@dataclass(frozen=True, slots=True)
class _Family:
    """qkv_bias, out_bias: None is what `attention_bias` says. windows: which layers a `sliding_window` binds when
    `layer_types` does not say: all | asked (those from max_window_layers on, if use_sliding_window) | none."""

    theta: float = 10_000.0
    eps: float = 1e-6
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    qk_norm: bool = False
    head_dim: int | None = None
    tied: bool = False
    windows: str = "none"
    experts: str | None = None


# Gemma's defaults stand here because its published files leave them out.
_GEMMA: Final = _Family(theta=1e6, qk_norm=True, head_dim=256, tied=True)
_GEMMA_DEFAULTS: Final = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4}
_GEMMA_PATTERN: Final = 6  # each sixth layer is global
FAMILIES: Final[dict[str, _Family]] = {
    "Llama": _Family(),
    "Mistral": _Family(qkv_bias=False, out_bias=False, windows="all"),
    "Mixtral": _Family(theta=1e6, eps=1e-5, qkv_bias=False, out_bias=False, windows="all", experts="mixtral"),
    "SmolLM3": _Family(theta=2e6, tied=True),
    "Qwen2": _Family(qkv_bias=True, out_bias=False, windows="asked"),
    "Qwen3": _Family(qk_norm=True, head_dim=128, windows="asked"),
    "Qwen3Moe": _Family(qk_norm=True, head_dim=128, windows="asked", experts="qwen"),
    "Gemma3": _GEMMA,
}
ENCODERS: Final = ("Bert", "Roberta", "XLMRoberta", "ModernBert", "NomicBert", "NewModel", "MPNet", "DistilBert")
# The class of a bare decoder, and how it is served: as people publish embedding models.
_BARE: Final = ("Llama", "Mistral", "Qwen2", "Qwen3")
ARCHITECTURES: Final[dict[str, str]] = {
    **{f"{name}ForCausalLM": name for name in FAMILIES},
    "Gemma3ForConditionalGeneration": "Gemma3",
    **{f"{name}Model": name for name in _BARE},
}
_ACTIVATIONS: Final = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_POOLINGS: Final = {
    "pooling_mode_lasttoken": LAST,
    "pooling_mode_mean_tokens": MEAN,
    "pooling_mode_cls_token": FIRST,
}


_Count = Annotated[int, msgspec.Meta(ge=1)]


class _Raw(msgspec.Struct):
    """What this engine reads of config.json; transformers of any version since 4.30 may have written it."""

    architectures: list[str] | None = None
    vocab_size: _Count | None = None
    hidden_size: _Count | None = None
    intermediate_size: _Count | None = None
    num_hidden_layers: _Count | None = None
    num_attention_heads: _Count | None = None
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    max_position_embeddings: _Count | None = None
    rms_norm_eps: float | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    rope_theta: float | None = None
    rope_local_base_freq: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    max_window_layers: int | None = None
    sliding_window_pattern: _Count | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: _Count | None = None
    num_experts: _Count | None = None
    num_local_experts: _Count | None = None
    num_experts_per_tok: _Count | None = None
    moe_intermediate_size: _Count | None = None
    decoder_sparse_step: _Count | None = None
    mlp_only_layers: list[int] | None = None
    norm_topk_prob: bool | None = None
    query_pre_attn_scalar: Annotated[float, msgspec.Meta(gt=0)] | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: bool | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None


class _Generation(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def read_config(folder: Path) -> ModelConfig:
    """Of config.json and, where they are there, generation_config.json, modules.json and 1_Pooling/config.json.
    Raises Unsupported."""
    raw = _json(folder / "config.json")
    if raw is None:
        raise Unsupported(f"{folder} has no config.json")
    config = parse_config(raw, _json(folder / "generation_config.json"))
    pooling, modules = _json(folder / "1_Pooling" / "config.json"), _json(folder / "modules.json")
    if pooling is None and config.pooling is None:
        return config
    how = next((mode for key, mode in _POOLINGS.items() if pooling and pooling.get(key)), None)
    if pooling and how is None:
        raise Unsupported(f"1_Pooling/config.json asks for a pooling that is not known; known: {', '.join(_POOLINGS)}")
    steps = [str(step.get("type")).rpartition(".")[2] for step in modules] if isinstance(modules, list) else []
    if odd := sorted(set(steps) - {"Transformer", "Pooling", "Normalize"}):
        raise Unsupported(f"modules.json has the step {', '.join(odd)}; known: Transformer, Pooling, Normalize")
    return replace(config, pooling=how or LAST, normalised=not steps or "Normalize" in steps)


def parse_config(config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """config: what config.json holds; generation: what generation_config.json does. Raises Unsupported."""
    outer = _convert(config, _Raw, "config.json")
    architecture = (outer.architectures or ["(none)"])[0]
    name = _family_of(architecture)
    family = FAMILIES[name]
    raw = outer
    if outer.text_config is not None:
        raw = _convert({**outer.text_config, "architectures": [architecture]}, _Raw, "config.json: text_config")
    if name == "Gemma3":
        for key, value in _GEMMA_DEFAULTS.items():
            if getattr(raw, key) is None:
                setattr(raw, key, value)
    _refuse(architecture, outer, raw)

    hidden, heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    groups = raw.num_key_value_heads or heads
    if heads % groups:
        raise Unsupported(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    head_dim = raw.head_dim or family.head_dim or hidden // heads
    if head_dim < 2 or head_dim % 2:
        raise Unsupported(f"config.json: heads of {head_dim} dimensions cannot be turned in pairs")
    context = raw.max_position_embeddings or (131_072 if name == "Gemma3" else 2048)
    experts = _experts(raw, family)
    layers, ropes = _layers(name, family, raw, context, experts is not None)
    scale = head_dim if name != "Gemma3" else raw.query_pre_attn_scalar or 256.0
    bias = bool(raw.attention_bias)
    ends = _convert(generation, _Generation, "generation_config.json").eos_token_id if generation else None
    starts = _ids(raw.bos_token_id if raw.bos_token_id is not None else outer.bos_token_id)
    tied = outer.tie_word_embeddings if outer.tie_word_embeddings is not None else raw.tie_word_embeddings
    return ModelConfig(
        architecture=architecture,
        vocabulary=_size(raw, "vocab_size"),
        hidden=hidden,
        mlp=0 if experts and all(layer.experts for layer in layers) else _size(raw, "intermediate_size"),
        query_heads=heads,
        kv_heads=groups,
        head_dim=head_dim,
        layers=layers,
        ropes=ropes,
        context=context,
        eps=raw.rms_norm_eps if raw.rms_norm_eps is not None else family.eps,
        activation=_activation(raw, name),
        attention_scale=float(scale) ** -0.5,
        experts=experts,
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        out_bias=bias if family.out_bias is None else family.out_bias,
        mlp_bias=bool(raw.mlp_bias) and name in ("Llama", "SmolLM3"),
        qk_norm=family.qk_norm,
        sandwich=name == "Gemma3",
        norm_offset=1.0 if name == "Gemma3" else 0.0,
        embedding_scale=math.sqrt(hidden) if name == "Gemma3" else 1.0,
        tied=family.tied if tied is None else tied,
        expert_names=family.experts or "qwen",
        stored=raw.dtype or raw.torch_dtype or outer.dtype or outer.torch_dtype,
        bos=starts[0] if starts else None,
        eos=_ids(ends) or _ids(raw.eos_token_id) or _ids(outer.eos_token_id),
        pooling=LAST if architecture.endswith("Model") else None,
        also_sees=architecture.endswith("ForConditionalGeneration"),
    )


def _family_of(architecture: str) -> str:
    if name := ARCHITECTURES.get(architecture):
        return name
    if architecture.startswith(ENCODERS):
        raise Unsupported(f"{architecture} is an encoder, which this engine does not serve; a GGUF of it is")
    raise Unsupported(f"architecture {architecture} is not known; known: {', '.join(ARCHITECTURES)}")


def _refuse(architecture: str, outer: _Raw, raw: _Raw) -> None:
    """What would be answered wrongly, or not at all."""
    quantised = outer.quantization_config or raw.quantization_config
    if quantised is not None:
        method = quantised.get("quant_method", "an unnamed method")
        raise Unsupported(f"{architecture} is quantised by {method}; known: unquantised weights (f32, bf16, f16)")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if value := getattr(raw, key):
            raise Unsupported(f"config.json: {key} = {value} is not known; known: none")
    if raw.partial_rotary_factor not in (None, 1.0):
        raise Unsupported(f"config.json: partial_rotary_factor = {raw.partial_rotary_factor} is not known; known: 1")


def _layers(
    name: str, family: _Family, raw: _Raw, context: int, routed: bool
) -> tuple[tuple[Layer, ...], tuple[Rope, ...]]:
    count = _size(raw, "num_hidden_layers")
    kinds = raw.layer_types or _kinds(name, family, raw, count)
    for key in ("layer_types", "no_rope_layers"):
        if (given := getattr(raw, key)) is not None and len(given) < count:
            raise Unsupported(f"config.json: {key} has {len(given)} entries for {count} layers")
    if odd := sorted(set(kinds) - {SLIDING, FULL}):
        raise Unsupported(f"config.json: layer_types has {', '.join(odd)}; known: {SLIDING}, {FULL}")
    window = raw.sliding_window
    if SLIDING in kinds and not window:
        raise Unsupported(f"config.json: layers of {SLIDING} need a sliding_window")
    ropes = _ropes(name, family, raw, context)
    unturned: Sequence[int] = ()
    if name == "SmolLM3":
        every = raw.no_rope_layer_interval or 4
        turned = raw.no_rope_layers or [int((i + 1) % every != 0) for i in range(count)]
        unturned = [i for i in range(count) if not turned[i]]
    dense = set(raw.mlp_only_layers or ())
    step = raw.decoder_sparse_step or 1
    layers = []
    for i in range(count):
        slides = kinds[i] == SLIDING
        layers.append(
            Layer(
                window=window if slides else None,
                rope=None if i in unturned else (1 if slides and len(ropes) > 1 else 0),
                experts=routed and i not in dense and (i + 1) % step == 0,
            )
        )
    return tuple(layers), ropes


def _kinds(name: str, family: _Family, raw: _Raw, count: int) -> list[str]:
    if name == "Gemma3":
        pattern = raw.sliding_window_pattern or _GEMMA_PATTERN
        raw.sliding_window = raw.sliding_window or 4096
        return [SLIDING if (i + 1) % pattern else FULL for i in range(count)]
    if family.windows == "all" and raw.sliding_window:
        return [SLIDING] * count
    if family.windows == "asked" and raw.use_sliding_window and raw.sliding_window:
        # transformers' mixture lets the window bind every layer, its dense Qwen those above a bound.
        first = 0 if family.experts else raw.max_window_layers if raw.max_window_layers is not None else 28
        return [SLIDING if i >= first else FULL for i in range(count)]
    return [FULL] * count


def _ropes(name: str, family: _Family, raw: _Raw, context: int) -> tuple[Rope, ...]:
    """The first is that of the full layers; Gemma's sliding ones have another."""
    given = raw.rope_parameters or {}
    by_kind = FULL in given or SLIDING in given
    full = given.get(FULL) if by_kind else given
    full = {**(raw.rope_scaling or {}), **(full or {})}
    theta = raw.rope_theta if raw.rope_theta is not None else family.theta
    first = _rope(full, theta, context)
    if name != "Gemma3":
        return (first,)
    near = raw.rope_local_base_freq if raw.rope_local_base_freq is not None else 10_000.0
    return first, _rope((given.get(SLIDING) or {}) if by_kind else {}, near, context)


def _rope(given: dict[str, Any], theta: float, context: int) -> Rope:
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise Unsupported(f"config.json: rope_type {kind} is not known; known: default, linear, llama3, yarn")
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise Unsupported("config.json: a partial_rotary_factor in rope_parameters is not known; known: 1")
    try:
        original = int(given.get("original_max_position_embeddings") or context)
        rope = Rope(theta=float(given.get("rope_theta") or theta), kind=kind, original_context=original)
        if kind == "default":
            return rope
        factor = float(given.get("factor") or context / original)
        rope = replace(rope, factor=factor)
        if kind == "llama3":
            low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
            return replace(rope, low_freq_factor=low, high_freq_factor=high)
        if kind == "yarn":
            return replace(
                rope,
                beta_fast=float(given.get("beta_fast") or 32),
                beta_slow=float(given.get("beta_slow") or 1),
                truncate=bool(given.get("truncate", True)),
                magnitude=_yarn_magnitude(given, factor),
            )
        return rope
    except (KeyError, TypeError, ValueError) as err:
        raise Unsupported(f"config.json: the rope parameters of type {kind} cannot be read: {err!r}") from err


def _yarn_magnitude(given: dict[str, Any], factor: float) -> float:
    """The paper's 0.1 ln(s) + 1, unless the file says otherwise."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def grown(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return grown(float(given["mscale"])) / grown(float(given["mscale_all_dim"]))
    return grown(1.0)


def _experts(raw: _Raw, family: _Family) -> Experts | None:
    if family.experts is None:
        return None
    mixtral = family.experts == "mixtral"
    count = raw.num_local_experts or raw.num_experts or (8 if mixtral else 128)
    width = _size(raw, "intermediate_size") if mixtral else raw.moe_intermediate_size or 768
    per_token = raw.num_experts_per_tok or (2 if mixtral else 8)
    if per_token > count:
        raise Unsupported(f"config.json: num_experts_per_tok = {per_token} of {count} experts")
    return Experts(count, per_token, width, renormalised=mixtral or bool(raw.norm_topk_prob))


def _activation(raw: _Raw, name: str) -> str:
    given = raw.hidden_activation or raw.hidden_act or ("gelu_pytorch_tanh" if name == "Gemma3" else "silu")
    if given not in _ACTIVATIONS:
        raise Unsupported(f"config.json: the activation {given} is not known; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[given]


def _size(raw: _Raw, key: str) -> int:
    value = getattr(raw, key)
    if value is None:
        raise Unsupported(f"config.json has no {key}")
    return int(value)


def _ids(given: int | list[int] | None) -> tuple[int, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, int) else tuple(given)


def _convert(value: Any, kind: type[Any], where: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as err:
        raise Unsupported(f"{where}: {err}") from err


def _json(path: Path) -> Any:
    """None where there is no such file."""
    try:
        return msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as err:
        raise Unsupported(f"{path.name} cannot be read: {err}") from err
