"""What a name means on disk, without a network. Small files in a temporary folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.helpers.aio import run

from helexa.core.errors import BadRequest, ModelNotFound, NeverLoads, PermissionDenied
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.store import Store


def put(root: Path, *names: str, content: bytes = b"GGUF...") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def store(models: Path, tmp_path: Path) -> Store:
    return make_store(models, tmp_path)


def make_store(models: Path, tmp_path: Path, **options: object) -> Store:
    settings: dict[str, object] = {"models_dir": models, "allowed_roots": [], "allow_downloads": False}
    settings |= {"gguf_owners": ["maker"], "hf_home": tmp_path / "hf"}
    return Store(**(settings | options))  # type: ignore[arg-type]


def found(store: Store, **profile: object) -> list[str]:
    files = store.find_local(LoadRequest(**profile))  # type: ignore[arg-type]
    assert files is not None
    return [f.name for f in files.files]


def test_each_file_is_a_model_under_its_relative_name(store: Store, models: Path) -> None:
    put(models, "tiny.Q4_1.gguf", "qwen/Qwen3-8B-Q4_K_M.gguf", "qwen/notes.txt", ".trash/x.gguf")
    assert {m.id: m.quant for m in store.on_disk()} == {"tiny.Q4_1": "Q4_1", "qwen/Qwen3-8B-Q4_K_M": "Q4_K_M"}
    assert found(store, model_id="qwen/Qwen3-8B-Q4_K_M") == ["Qwen3-8B-Q4_K_M.gguf"]
    assert found(store, model_id="tiny.Q4_1.gguf") == ["tiny.Q4_1.gguf"]


def test_the_id_of_the_request_is_the_id_of_the_files(store: Store, models: Path) -> None:
    put(models, "tiny.gguf")
    by_path = store.find_local(LoadRequest(source="tiny.gguf"))
    named = store.find_local(LoadRequest(model_id="small", source=str(models / "tiny.gguf")))
    assert by_path is not None
    assert named is not None
    assert (by_path.model_id, named.model_id) == ("tiny", "small")


def test_a_folder_means_its_model_of_the_wanted_quant(store: Store, models: Path) -> None:
    put(models, "acme/tiny/tiny-Q4_K_M.gguf", "acme/tiny/tiny-Q8_0.gguf")
    assert found(store, model_id="acme/tiny") == ["tiny-Q4_K_M.gguf"]
    assert found(store, model_id="acme/tiny:q8_0") == ["tiny-Q8_0.gguf"]
    assert found(store, model_id="acme/tiny", quant="Q8_0") == ["tiny-Q8_0.gguf"]
    assert found(store, source=str(models / "acme/tiny"), quant="q8_0") == ["tiny-Q8_0.gguf"]
    assert store.find_local(LoadRequest(model_id="acme/tiny", quant="Q5_0")) is None
    with pytest.raises(NeverLoads, match="has no Q5_0; it has Q4_K_M, Q8_0"):
        store.find_local(LoadRequest(source=str(models / "acme/tiny"), quant="Q5_0"))


def test_a_split_model_is_one_model_with_all_parts(store: Store, models: Path) -> None:
    put(models, *[f"big/big-Q8_0-{n:05}-of-00003.gguf" for n in (1, 2, 3)])
    (model,) = store.on_disk()
    assert model.id == "big/big-Q8_0"
    assert len(found(store, model_id="big/big-Q8_0")) == 3
    assert found(store, source=str(models / "big/big-Q8_0-00002-of-00003.gguf"))[0] == "big-Q8_0-00001-of-00003.gguf"


def test_an_incomplete_split_is_named(store: Store, models: Path) -> None:
    put(models, "big-00001-of-00003.gguf", "big-00003-of-00003.gguf")
    (model,) = store.on_disk()
    assert model.error == "big.gguf is split in 3 and part 2 is missing"
    with pytest.raises(NeverLoads, match="part 2 is missing"):
        store.find_local(LoadRequest(model_id="big"))


@pytest.mark.parametrize(
    ("content", "why"), [(b"", "x.gguf is empty"), (b"<html>", r"not a GGUF file \(it begins with b'<htm'\)")]
)
def test_what_is_no_gguf_file_is_told(store: Store, models: Path, content: bytes, why: str) -> None:
    put(models, "x.gguf", content=content)
    with pytest.raises(NeverLoads, match=why):
        store.find_local(LoadRequest(model_id="x"))


def test_an_absent_file_is_told(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NeverLoads, match=r"/nowhere/x\.gguf is not there"):
        store.find_local(LoadRequest(source="/nowhere/x.gguf"))
    with pytest.raises(NeverLoads, match="holds no model"):
        store.find_local(LoadRequest(source=str(tmp_path)))


def test_a_projector_goes_with_the_only_model_of_its_folder(store: Store, models: Path) -> None:
    put(models, "eyes/gemma-Q4_0.gguf", "eyes/gemma-Q8_0.gguf", "eyes/mmproj-F16.gguf")
    files = store.find_local(LoadRequest(model_id="eyes", quant="Q8_0"))
    assert files is not None
    assert files.projector == models / "eyes/mmproj-F16.gguf"


def test_among_several_models_a_projector_goes_with_the_one_it_is_named_after(store: Store, models: Path) -> None:
    put(models, "gemma-3-4b-Q4_0.gguf", "qwen-vl-Q4_0.gguf", "llama-Q4_0.gguf")
    put(models, "mmproj-gemma-3-4b-f16.gguf", "qwen-vl-mmproj-f16.gguf")
    names = {m.id: m.projector.name if m.projector else None for m in store.on_disk()}
    assert names == {
        "gemma-3-4b-Q4_0": "mmproj-gemma-3-4b-f16.gguf",
        "qwen-vl-Q4_0": "qwen-vl-mmproj-f16.gguf",
        "llama-Q4_0": None,
    }


def test_projector_draft_and_adapters_can_be_named(store: Store, models: Path) -> None:
    put(models, "m/m.gguf", "m/eyes.gguf", "draft.gguf", "style.gguf")
    files = store.find_local(
        LoadRequest(model_id="m/m", projector="eyes.gguf", draft="draft.gguf", lora=[str(models / "style.gguf")])
    )
    assert files is not None
    assert (files.projector, files.draft, files.lora) == (
        models / "m/eyes.gguf",
        models / "draft.gguf",
        (models / "style.gguf",),
    )
    with pytest.raises(NeverLoads, match=r"projector none\.gguf is not there"):
        store.find_local(LoadRequest(model_id="m/m", projector="none.gguf"))
    with pytest.raises(NeverLoads, match=r"none\.gguf is not there"):
        store.find_local(LoadRequest(model_id="m/m", draft="none.gguf"))


def test_a_model_folder_is_a_model_where_something_serves_it(models: Path, tmp_path: Path) -> None:
    put(models, "qwen/config.json", "qwen/model-00001-of-00002.safetensors", "qwen/model-00002-of-00002.safetensors")
    assert make_store(models, tmp_path).on_disk() == []
    store = make_store(models, tmp_path, formats=("gguf", "safetensors"))
    assert [m.id for m in store.on_disk()] == ["qwen"]
    assert len(found(store, model_id="qwen")) == 2


def test_a_model_folder_that_lacks_a_part_is_named(models: Path, tmp_path: Path) -> None:
    put(models, "qwen/config.json", "qwen/model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (models / "qwen/model.safetensors.index.json").write_text(json.dumps(index))
    store = make_store(models, tmp_path, formats=("gguf", "safetensors"))
    with pytest.raises(NeverLoads, match=r"model-2\.safetensors missing"):
        store.find_local(LoadRequest(model_id="qwen"))


def test_a_named_harness_finds_its_own_format_and_a_dtype_is_no_quantisation(models: Path, tmp_path: Path) -> None:
    put(models, "qwen/config.json", "qwen/model.safetensors", "qwen/qwen-Q8_0.gguf")
    store = make_store(models, tmp_path, formats=("gguf", "safetensors"))

    def suffix(**asked: str) -> str:
        return Path(found(store, **asked)[0]).suffix

    for source in ("qwen", str(models / "qwen")):
        way = {"model_id": "x", "source": source}
        assert suffix(**way, harness="torch") == ".safetensors"
        assert suffix(**way, harness="torch", quant="bf16") == ".safetensors"
        assert suffix(**way, harness="llama", quant="Q8_0") == ".gguf"
    assert suffix(model_id="qwen", harness="torch") == ".safetensors"
    assert suffix(model_id="qwen/qwen-Q8_0", harness="llama") == ".gguf"
    assert suffix(model_id="x", source="qwen") == ".gguf"
    assert suffix(model_id="x", source="qwen", quant="int8") == ".safetensors"
    with pytest.raises(NeverLoads, match="has no Q8_0"):
        store.find_local(LoadRequest(model_id="x", source="qwen", harness="torch", quant="Q8_0"))


def test_new_gone_and_growing_files_are_seen(store: Store, models: Path) -> None:
    assert store.on_disk() == []
    put(models, "sub/a.gguf")
    assert [m.size_bytes for m in store.on_disk()] == [7]
    with (models / "sub/a.gguf").open("ab") as file:
        file.write(b"more")
    assert [m.size_bytes for m in store.on_disk()] == [11]
    (models / "sub/a.gguf").unlink()
    assert store.on_disk() == []


def test_nothing_is_read_again_while_nothing_changes(store: Store, models: Path) -> None:
    put(models, "a.gguf")
    assert store.on_disk() is store.on_disk()


def test_links_are_followed_and_circles_survived(store: Store, models: Path, tmp_path: Path) -> None:
    put(tmp_path / "big-disk", "b.gguf")
    (models / "more").symlink_to(tmp_path / "big-disk")
    (models / "circle").symlink_to(models)
    assert [m.id for m in store.on_disk()] == ["more/b"]


def test_a_models_dir_that_is_absent_is_empty_and_seen_when_it_comes(tmp_path: Path) -> None:
    store = make_store(tmp_path / "later", tmp_path)
    assert store.on_disk() == []
    put(tmp_path / "later", "a.gguf")
    assert [m.id for m in store.on_disk()] == ["a"]


def test_a_name_that_nobody_knows_gets_the_nearest(store: Store, models: Path) -> None:
    put(models, "smollm2.gguf")
    assert store.find_local(LoadRequest(model_id="smolm2")) is None
    with pytest.raises(ModelNotFound, match=r"smolm2 is not on this node's disk; did you mean smollm2\?"):
        run(store.resolve(LoadRequest(model_id="smolm2"), lambda p: None))


@pytest.mark.parametrize(
    ("profile", "param"),
    [
        ({}, "model_id"),
        ({"source": "not a reference"}, "source"),
        ({"source": "a\0b"}, "source"),
        ({"source": "acme/tiny:Q4_0", "quant": "Q8_0"}, "quant"),
    ],
)
def test_a_contradiction_is_a_bad_request(store: Store, profile: dict[str, str], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        store.find_local(LoadRequest(**profile))
    assert refused.value.param == param


# ---- what a remote caller may name


@pytest.fixture
def outside(tmp_path: Path, models: Path) -> Path:
    put(models, "in.gguf", "sub/in.gguf")
    put(tmp_path, "secret.gguf")
    (models / "link.gguf").symlink_to(tmp_path / "secret.gguf")
    (models / "up").symlink_to(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "source", ["in.gguf", "sub", "sub/in.gguf", "./sub/in.gguf", "acme/tiny", "acme/tiny:Q4_0", "{models}/in.gguf"]
)
def test_a_remote_caller_may_name_what_is_below_models_dir_and_the_hub(
    store: Store, outside: Path, models: Path, source: str
) -> None:
    store.check_source_allowed(source.format(models=models), local_caller=False)


@pytest.mark.parametrize(
    "source",
    [
        "/etc/passwd",
        "../secret.gguf",
        "sub/../../secret.gguf",
        "{models}/../secret.gguf",
        "link.gguf",
        "up/secret.gguf",
        "up",
        "~/x.gguf",
        "~root",
        "{outside}/secret.gguf",
        "in.gguf\0",
        "..",
        "{models}-other/x.gguf",
    ],
)
def test_a_remote_caller_may_name_nothing_else(store: Store, outside: Path, models: Path, source: str) -> None:
    source = source.format(models=models, outside=outside)
    with pytest.raises(PermissionDenied, match="allowed_roots"):
        store.check_source_allowed(source, local_caller=False)
    store.check_source_allowed(source, local_caller=True)


def test_every_field_that_names_a_file_is_checked(store: Store, outside: Path) -> None:
    store.check_request_allowed(LoadRequest(model_id="x"), local_caller=False)
    for field in ({"source": "/x"}, {"draft": "/x"}, {"projector": "/x"}, {"lora": ["in.gguf", "/x"]}):
        with pytest.raises(PermissionDenied, match="'/x'"):
            store.check_request_allowed(LoadRequest(model_id="x", **field), local_caller=False)  # type: ignore[arg-type]


def test_allowed_roots_are_allowed(models: Path, outside: Path) -> None:
    store = make_store(models, outside, allowed_roots=[outside])
    store.check_source_allowed(str(outside / "secret.gguf"), local_caller=False)
    store.check_source_allowed("link.gguf", local_caller=False)


def test_without_models_dir_a_remote_caller_may_name_no_path(tmp_path: Path) -> None:
    store = make_store(tmp_path, tmp_path, models_dir=None)
    store.check_source_allowed("acme/tiny", local_caller=False)
    for source in ("x.gguf", "/x", "./x"):
        with pytest.raises(PermissionDenied, match="none are set"):
            store.check_source_allowed(source, local_caller=False)


# ---- removing


def test_all_parts_of_a_model_are_removed_and_its_empty_folders(store: Store, models: Path) -> None:
    put(models, "a/b/big-00001-of-00002.gguf", "a/b/big-00002-of-00002.gguf", "a/b/mmproj-big.gguf", "other.gguf")
    gone = store.remove("a/b/big", in_use=[])
    assert [f.name for f in gone] == ["big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "mmproj-big.gguf"]
    assert os.listdir(models) == ["other.gguf"]


def test_a_projector_that_another_model_needs_stays(store: Store, models: Path) -> None:
    put(models, "eyes/gemma-Q4_0.gguf", "eyes/gemma-Q8_0.gguf", "eyes/mmproj-F16.gguf")
    store.remove("eyes/gemma-Q4_0", in_use=[])
    assert sorted(os.listdir(models / "eyes")) == ["gemma-Q8_0.gguf", "mmproj-F16.gguf"]


def test_removing_a_link_leaves_what_it_points_to(store: Store, models: Path, tmp_path: Path) -> None:
    put(tmp_path, "far/x.gguf")
    (models / "x.gguf").symlink_to(tmp_path / "far/x.gguf")
    assert store.remove("x", in_use=[]) == [models / "x.gguf"]
    assert (tmp_path / "far/x.gguf").exists()


def test_a_model_folder_at_the_top_takes_no_other_model_along(models: Path, tmp_path: Path) -> None:
    put(models, "config.json", "model.safetensors", "tokenizer.json", "tiny.gguf")
    store = make_store(models, tmp_path, formats=("gguf", "safetensors"))
    store.remove("models", in_use=[])
    assert os.listdir(models) == ["tiny.gguf"]


def test_models_dir_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path, "models/a.gguf")
    store = make_store(Path("~/models"), tmp_path)
    assert [m.source for m in store.on_disk()] == [str(tmp_path / "models/a.gguf")]
