"""What is read from config.json, and what is refused there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.neuron.harness.torch.config import Experts, Layer, Rope, Unsupported
from helexa.neuron.harness.torch.families import ARCHITECTURES, parse_config, read_config

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def config(architecture: str = "LlamaForCausalLM", **more: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SIZES, **more}


def test_a_plain_llama_is_read_with_what_its_file_says_and_the_familys_defaults() -> None:
    found = parse_config(config(rope_theta=5e5, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2))
    assert found.ropes == (Rope(theta=5e5, original_context=4096),)
    assert found.layers == (Layer(),) * 4
    assert (found.head_dim, found.eps, found.attention_scale) == (16, 1e-5, 0.25)
    assert (found.tied, found.qkv_bias, found.qk_norm) == (False, False, False)
    assert (found.bos, found.eos) == (1, (2,))


def test_the_old_and_the_new_way_to_write_a_rope_give_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = parse_config(config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling}))
    older = parse_config(config(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling}))
    new = parse_config(config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}))
    assert old == older == new
    assert new.ropes[0].original_context == 64


def test_ends_come_from_the_generation_config_first() -> None:
    assert parse_config(config(eos_token_id=2), {"eos_token_id": [7, 8]}).eos == (7, 8)
    assert parse_config(config(eos_token_id=2), {}).eos == (2,)


@pytest.mark.parametrize(
    ("architecture", "more", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 32}, [32, 32, 32, 32]),
        ("MistralForCausalLM", {"sliding_window": None}, [None] * 4),
        ("LlamaForCausalLM", {"sliding_window": 32}, [None] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 32, "use_sliding_window": False}, [None] * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3},
            [None, None, None, 32],
        ),
        ("Gemma3ForCausalLM", {"sliding_window": 32, "sliding_window_pattern": 2}, [32, None, 32, None]),
    ],
)
def test_a_window_binds_the_layers_that_the_family_gives_it_to(
    architecture: str, more: dict[str, Any], windows: list[int | None]
) -> None:
    assert [layer.window for layer in parse_config(config(architecture, **more)).layers] == windows


def test_gemma_has_a_rope_for_near_layers_and_one_for_far_ones_and_defaults_for_what_its_files_leave_out() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 12, "sliding_window": 1024}
    scaling = {"rope_type": "linear", "factor": 8.0}
    found = parse_config(
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {**text, "rope_scaling": scaling}}
    )
    far, near = found.ropes
    assert (far.theta, far.kind, far.factor) == (1e6, "linear", 8.0)
    assert (near.theta, near.kind) == (1e4, "default")
    assert [layer.rope for layer in found.layers[:6]] == [1, 1, 1, 1, 1, 0]
    assert (found.query_heads, found.kv_heads, found.head_dim) == (8, 4, 256)
    assert (found.vocabulary, found.tied) == (262_208, True)
    assert found.also_sees


def test_smollm3_leaves_every_nth_layer_unturned() -> None:
    assert [layer.rope for layer in parse_config(config("SmolLM3ForCausalLM")).layers] == [0, 0, 0, None]
    given = parse_config(config("SmolLM3ForCausalLM", no_rope_layers=[0, 1, 1, 0]))
    assert [layer.rope for layer in given.layers] == [None, 0, 0, None]


def test_experts_are_read_with_the_layers_that_have_none() -> None:
    found = parse_config(
        config(
            "Qwen3MoeForCausalLM",
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=40,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        )
    )
    assert found.experts == Experts(6, 2, 40, renormalised=True)
    assert [layer.experts for layer in found.layers] == [True, False, True, True]
    assert (found.mlp, found.shape.experts) == (128, 6)
    assert parse_config(config("MixtralForCausalLM", num_local_experts=5)).mlp == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not known; known: LlamaForCausalLM, "),
        ({"architectures": None}, "(none) is not known"),
        ({"architectures": ["BertModel"]}, "BertModel is an encoder"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type longrope is not known; known: default"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "llama3 cannot be read: KeyError('low_freq_factor')",
        ),
        ({"hidden_act": "relu2"}, "activation relu2"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"vocab_size": None}, "config.json has no vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": "wide"}, "$.hidden_size"),
        ({"head_dim": 15}, "heads of 15 dimensions"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types has linear_attention; known: "),
        ({"layer_types": ["sliding_attention"] * 4}, "need a sliding_window"),
    ],
)
def test_what_would_be_answered_wrongly_is_refused_with_what_is_known(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(Unsupported) as refused:
        parse_config({**config(), **changed})
    assert said in str(refused.value)


def _folder(path: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_an_embedding_model_says_how_it_pools(tmp_path: Path) -> None:
    steps = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")]
    files = {"config.json": config("Qwen3ForCausalLM"), "modules.json": steps}
    found = read_config(_folder(tmp_path, {**files, "1_Pooling/config.json": {"pooling_mode_lasttoken": True}}))
    assert (found.pooling, found.normalised) == ("last", True)
    with pytest.raises(Unsupported, match="pooling"):
        read_config(_folder(tmp_path, {"1_Pooling/config.json": {"pooling_mode_weightedmean_tokens": True}}))
    dense = {"type": "sentence_transformers.models.Dense"}
    more = {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}, "modules.json": [*steps, dense]}
    with pytest.raises(Unsupported, match=r"modules\.json has the step Dense"):
        read_config(_folder(tmp_path, more))


def test_a_bare_decoder_is_an_embedding_model_and_a_chat_model_is_none() -> None:
    assert parse_config(config("MistralModel")).pooling == "last"
    assert parse_config(config("MistralForCausalLM")).pooling is None


def test_a_file_that_is_absent_or_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"has no config\.json"):
        read_config(tmp_path)
    with pytest.raises(Unsupported, match=r"config\.json cannot be read"):
        read_config(_folder(tmp_path, {"config.json": "{"}))
    with pytest.raises(Unsupported, match=r"config\.json: Expected `object`, got `array`"):
        read_config(_folder(tmp_path, {"config.json": "[]"}))


ANYTHING = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(0, 9) | st.text(max_size=3) | st.lists(st.text())
KEYS = st.sampled_from(
    [*SIZES, "head_dim", "rope_scaling", "layer_types", "sliding_window", "text_config", "eos_token_id", "torch_dtype"]
)


@given(st.sampled_from(sorted(ARCHITECTURES)), st.dictionaries(KEYS, ANYTHING, max_size=3))
def test_a_config_with_anything_in_it_is_read_or_refused(architecture: str, changes: dict[str, Any]) -> None:
    try:
        found = parse_config({**config(architecture), **changes})
    except Unsupported:
        return
    assert len(found.layers) >= 1
    assert found.query_heads % found.kv_heads == 0
    assert found.attention_scale > 0
