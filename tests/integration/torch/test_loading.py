"""What a rank reads of a model's files, and what it refuses there."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'helexa[torch]'")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.helpers import safetensors_models as models  # noqa: E402

from helexa.neuron.harness.torch import weights as weights_module  # noqa: E402
from helexa.neuron.harness.torch.families import read_config  # noqa: E402
from helexa.neuron.harness.torch.layout import pieces  # noqa: E402
from helexa.neuron.harness.torch.safetensors_files import NotWhole  # noqa: E402
from helexa.neuron.harness.torch.shard import load_shard, whole_model  # noqa: E402
from helexa.neuron.harness.torch.weights import open_weights  # noqa: E402
from helexa.neuron.tp.partition import partition  # noqa: E402


def changed(folder: Path, change: Any) -> Path:
    shutil.copytree(models.random_model("llama"), folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_tensor_that_lacks_or_has_another_shape_or_dtype_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(NotWhole, match=f"tensor {name} is in none"):
        load_shard(whole_model(changed(tmp_path / "lacks", lambda tensors: tensors.pop(name))), None)
    turned = changed(tmp_path / "turned", lambda t: t.update({name: t[name].t().contiguous()}))
    with pytest.raises(NotWhole, match=rf"tensor {name} has the shape \[64, 200\], config\.json wants \[200, 64\]"):
        load_shard(whole_model(turned), None)
    with pytest.raises(NotWhole, match=f"tensor {name} is I32"):
        load_shard(whole_model(changed(tmp_path / "int", lambda t: t.update({name: t[name].int()}))), None)
    with pytest.raises(NotWhole, match=r"model\.embed_tokens\.weight is in none"):
        load_shard(whole_model(changed(tmp_path / "e", lambda t: t.pop("model.embed_tokens.weight"))), None)


def test_a_truncated_file_is_refused_with_the_tensor_that_is_cut(tmp_path: Path) -> None:
    folder = changed(tmp_path / "cut", lambda tensors: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(NotWhole, match=r"model\.safetensors is truncated: tensor model\."):
        load_shard(whole_model(folder), None)


@pytest.mark.parametrize("family", ["llama-4-groups", "qwen3-moe"])
@pytest.mark.parametrize("given", [[1, 1], [3, 1, 1]])
def test_each_rank_reads_its_slices_and_no_more_and_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, family: str, given: list[float]
) -> None:
    folder = models.random_model(family)
    config = read_config(folder)
    whole = load_file(folder / "model.safetensors")
    read: Counter[str] = Counter()
    opened = weights_module.safe_open

    class Spy:
        def __init__(self, *args: Any, **more: Any) -> None:
            self._opening = opened(*args, **more)

        def __enter__(self) -> Spy:
            self._file = self._opening.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self._opening.__exit__(*args)

        def get_slice(self, name: str) -> Any:
            inner = self._file.get_slice(name)

            class Slice:
                def __getitem__(self, index: Any) -> Any:
                    got = inner[index]
                    read[name] += got.numel()
                    return got

            return Slice()

    monkeypatch.setattr(weights_module, "safe_open", Spy)
    for share in partition(config.shape, len(given), given):
        read.clear()
        told: list[float] = []
        mine = dict(pieces(config, share))
        with open_weights(folder, config, share, told.append) as weights:
            for name, piece in mine.items():
                tensor = weights.read(name)
                expected = whole[f"model.{name}" if not name.startswith("lm_head") else name]
                if piece.span is not None and piece.cut is not None:
                    expected = expected.narrow(piece.cut, piece.span.start, piece.span.size)
                assert torch.equal(tensor, expected)
        assert sum(read.values()) == sum(torch.Size(piece.held).numel() for piece in mine.values())
        assert told == sorted(told)
        assert told[-1] == 1.0


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_that_also_sees_is_found_under_its_names(tmp_path: Path, prefix: str) -> None:
    plain = models.random_model("gemma3")
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    tensors = load_file(plain / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file({**renamed, "vision_tower.patch": torch.zeros(3)}, tmp_path / "model.safetensors")
    text = json.loads((plain / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    shard = load_shard(whole_model(tmp_path), None)
    assert shard.config.also_sees
