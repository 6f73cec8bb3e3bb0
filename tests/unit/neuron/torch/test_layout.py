"""Which part of which tensor a rank holds."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from helexa.neuron.harness.torch.config import ModelConfig, heads_of
from helexa.neuron.harness.torch.families import parse_config
from helexa.neuron.harness.torch.layout import pieces, weight_bytes
from helexa.neuron.tp.partition import partition


def config(heads: int, groups: int, architecture: str = "LlamaForCausalLM", **more: object) -> ModelConfig:
    return parse_config(
        {
            "architectures": [architecture],
            "vocab_size": 1000,
            "hidden_size": 64,
            "intermediate_size": 200,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": 16,
            **more,
        }
    )


MODELS = st.sampled_from(
    [
        config(9, 3),
        config(8, 2, "Qwen3ForCausalLM", tie_word_embeddings=True),
        config(4, 4, "Qwen2ForCausalLM"),
        config(8, 1, "Gemma3ForCausalLM"),
        config(4, 2, "MixtralForCausalLM", num_local_experts=5),
    ]
)
WEIGHTS = st.lists(st.floats(0.2, 5), min_size=1, max_size=4)


@given(MODELS, WEIGHTS)
def test_every_row_and_column_is_held_once_but_for_kv_heads_that_are_shared(
    model: ModelConfig, weights: list[float]
) -> None:
    (whole,) = partition(model.shape, 1)
    ranks = [dict(pieces(model, share)) for share in partition(model.shape, len(weights), weights)]
    for name, piece in pieces(model, whole):
        held = [rank[name] for rank in ranks if name in rank]
        assert all(one.shape == piece.shape for one in held)
        if piece.cut is None:
            assert len(held) == (1 if "experts." in name else len(ranks))
            continue
        lines = Counter(line for one in held if one.span for line in range(one.span.start, one.span.stop))
        assert set(lines) == set(range(piece.shape[piece.cut]))
        if "k_proj" not in name and "v_proj" not in name:
            assert set(lines.values()) == {1}


@given(MODELS, WEIGHTS)
def test_each_query_head_of_a_rank_has_the_kv_head_of_its_group(model: ModelConfig, weights: list[float]) -> None:
    per_group = model.query_heads // model.kv_heads
    for share in partition(model.shape, len(weights), weights):
        heads = heads_of(model, share)
        read = [kv for kv in heads.kv for _ in range(heads.per_kv)]
        assert read == [query // per_group for query in range(share.query_heads.start, share.query_heads.stop)]


def test_bytes_are_those_of_the_tensors() -> None:
    model = config(4, 2, tie_word_embeddings=True)
    (whole,) = partition(model.shape, 1)
    attention, mlp, norms = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 200, 64 * 2
    linear = 2 * (attention + mlp)
    small = 4 * (2 * norms + 64)
    table = 1000 * 64  # of the embedding, and of the head that is the same
    assert weight_bytes(model, whole, "f32", on_gpu=True) == 4 * (table + linear) + small
    assert weight_bytes(model, whole, "bf16", on_gpu=True) == 2 * (table + linear) + small
    assert weight_bytes(model, whole, "f32") == 4 * (2 * table + linear) + small
    assert weight_bytes(model, whole, "int8") == 2 * table + table + linear + small
    narrow = config(4, 2, tie_word_embeddings=True, torch_dtype="bfloat16")
    assert weight_bytes(narrow, whole, "f32") == 2 * table + 4 * (table + linear) + small
    assert model.kv_bytes_per_token(whole, 4) == 2 * 2 * 2 * 16 * 4
