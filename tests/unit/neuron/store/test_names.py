from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.neuron.store.names import (
    HubRef,
    gguf_repos,
    group,
    is_model,
    is_projector,
    parse_ref,
    pick,
    pick_projector,
    quant_of,
    tags,
)


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("Qwen/Qwen3-8B", HubRef("Qwen/Qwen3-8B")),
        ("unsloth/Qwen3-8B-GGUF:Q4_K_M", HubRef("unsloth/Qwen3-8B-GGUF", "Q4_K_M")),
        ("https://huggingface.co/Qwen/Qwen3-8B/", HubRef("Qwen/Qwen3-8B")),
        ("hf.co/bartowski/x_y-GGUF:q8_0", HubRef("bartowski/x_y-GGUF", "q8_0")),
        ("a/b:one.gguf", HubRef("a/b", "one.gguf")),
    ],
)
def test_a_reference_is_owner_repo_and_perhaps_a_quant(text: str, ref: HubRef) -> None:
    assert parse_ref(text) == ref


@pytest.mark.parametrize(
    "text",
    ["", "qwen", "/srv/x", "./a/b", "../b", "a/../b", "a/b/c", "a/b.gguf", "a/b:", "a/b:../c", "a--b/c", "a/b..c",
     ".a/b", "a/.b", "a b/c", "a/b\0", "a/b:x y", "~/models", "a/b."],
)  # fmt: skip
def test_nothing_else_is_a_reference(text: str) -> None:
    assert parse_ref(text) is None


@given(st.text())
def test_a_reference_never_leads_out_of_a_folder(text: str) -> None:
    ref = parse_ref(text)
    if ref is not None:
        parts = ref.repo.split("/")
        assert len(parts) == 2
        assert all(p not in ("", ".", "..") and "/" not in p and "\0" not in p for p in parts)


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen3-8B-Q4_K_M", "Q4_K_M"),
        ("SmolLM2-135M-Instruct.Q4_1", "Q4_1"),
        ("gemma-3-270m-it-qat-q4_0", "Q4_0"),
        ("gpt-oss-20b-mxfp4", "MXFP4"),
        ("Qwen3-30B-A3B-UD-Q4_K_XL", "UD-Q4_K_XL"),
        ("model-IQ4_XS", "IQ4_XS"),
        ("Llama-3-IQ2_XXS.imatrix", "IQ2_XXS"),
        ("bitnet-TQ2_0", "TQ2_0"),
        ("BF16/Model-BF16", "BF16"),
        ("model-fp16", "F16"),
        ("Q4_K_M/Model-Q8_0", "Q8_0"),
        ("Qwen3-8B", None),
        ("model", None),
        ("F1-Sequel-Q2B", None),
    ],
)
def test_the_quant_is_read_from_the_name(name: str, quant: str | None) -> None:
    assert quant_of(name) == quant


def test_projectors_and_importance_matrices_are_not_models() -> None:
    assert is_projector("mmproj-F16.gguf")
    assert is_projector("vision/gemma-3-4b-it-mmproj-f16.GGUF")
    for name in ("mmproj-F16.gguf", "imatrix_unsloth.gguf", "model.imatrix.gguf", "model.bin", ".hidden.gguf"):
        assert not is_model(name)
    assert is_model("a/b/model.gguf")


def test_the_parts_of_a_split_file_are_one_model_in_order() -> None:
    (model,) = group([f"x/big-Q8_0-{n:05}-of-00003.gguf" for n in (3, 1, 2)])
    assert model.stem == "x/big-Q8_0"
    assert model.parts == tuple(f"x/big-Q8_0-{n:05}-of-00003.gguf" for n in (1, 2, 3))
    assert model.why_incomplete is None


def test_an_incomplete_split_names_what_is_missing() -> None:
    (one,) = group(["big-00001-of-00002.gguf"])
    assert one.why_incomplete == "big.gguf is split in 2 and part 2 is missing"
    (two,) = group(["big-00002-of-00004.gguf", "big-00004-of-00004.gguf"])
    assert two.why_incomplete == "big.gguf is split in 4 and parts 1, 3 are missing"


def test_a_file_of_another_split_is_another_model() -> None:
    assert len(group(["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "a-00001-of-00003.gguf", "a.gguf"])) == 3


@given(st.lists(st.sampled_from([f"{m}{s}.gguf" for m in ("a-Q4_0", "b", "mmproj-x") for s in
                                 ("", "-00001-of-00002", "-00002-of-00002")]), unique=True))  # fmt: skip
def test_every_model_file_is_in_exactly_one_model(files: list[str]) -> None:
    parts = [p for model in group(files) for p in model.parts]
    assert sorted(parts) == sorted(f for f in files if is_model(f))


def test_two_models_of_one_quant_are_told_apart_by_name() -> None:
    models = group(["big-Q4_0.gguf", "small-Q4_0.gguf", "odd.gguf"])
    assert list(tags(models)) == ["Q4_0", "odd", "small-Q4_0"]
    assert pick(models, "small-q4_0.gguf") == ("small-Q4_0", models[2])
    assert pick(models, "big-Q4_0") == ("Q4_0", models[0])


@pytest.mark.parametrize(
    ("there", "tag", "taken"),
    [
        (["Q8_0", "Q4_K_M", "Q4_0"], None, "Q4_K_M"),
        (["Q8_0", "UD-Q4_K_XL", "Q5_K_M"], None, "UD-Q4_K_XL"),
        (["F16", "Q8_0"], None, "Q8_0"),
        (["BF16"], None, "BF16"),
        (["Q8_0", "Q4_K_M"], "q8_0", "Q8_0"),
        (["UD-Q4_K_XL"], "Q4_K_XL", "UD-Q4_K_XL"),
        (["Q4_K_M"], "Q4_K", None),
    ],
)
def test_a_quant_is_matched_or_chosen(there: list[str], tag: str | None, taken: str | None) -> None:
    picked = pick(group([f"m-{q}.gguf" for q in there]), tag)
    assert (picked[0] if picked else None) == taken


def test_a_whole_model_is_preferred_to_an_incomplete_one() -> None:
    picked = pick(group(["m-Q4_K_M-00001-of-00002.gguf", "m-Q3_K_S.gguf"]), None)
    assert picked is not None
    assert picked[0] == "Q3_K_S"


def test_of_several_projectors_the_f16_one_is_taken() -> None:
    assert pick_projector(["mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf", "m.gguf"]) == "mmproj-F16.gguf"
    assert pick_projector(["m.gguf"]) is None


def test_gguf_repositories_are_looked_for_by_the_usual_names() -> None:
    assert gguf_repos("Qwen/Qwen3-8B", ["unsloth", "bartowski"]) == [
        "Qwen/Qwen3-8B-GGUF",
        "unsloth/Qwen3-8B-GGUF",
        "bartowski/Qwen3-8B-GGUF",
        "unsloth/Qwen_Qwen3-8B-GGUF",
        "bartowski/Qwen_Qwen3-8B-GGUF",
    ]
    assert gguf_repos("unsloth/Qwen3-8B-GGUF", ["unsloth"]) == []
