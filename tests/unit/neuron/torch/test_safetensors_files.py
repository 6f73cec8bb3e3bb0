"""Files that are not what they should be are refused before a byte is read, with the tensor's name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.neuron.harness.torch.safetensors_files import NotWhole, check, read_header, read_tensors


def write(path: Path, tensors: dict[str, Any], data: int = 1000) -> Path:
    head = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(data))
    return path


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_every_tensor_is_found_in_the_file_that_has_it(tmp_path: Path) -> None:
    write(tmp_path / "model-00001-of-00002.safetensors", {"a": tensor([2, 3], 0, 24), "__metadata__": {"x": "y"}})
    write(tmp_path / "model-00002-of-00002.safetensors", {"b": tensor([4], 0, 8, "BF16")})
    found = read_tensors(tmp_path)
    assert {name: (one.file.name[6:11], one.dtype, one.shape) for name, one in found.items()} == {
        "a": ("00001", "F32", (2, 3)),
        "b": ("00002", "BF16", (4,)),
    }


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"w": tensor([2, 300], 0, 2400)}, "truncated: tensor w ends at byte 2400 of its data, which has 1000"),
        ({"w": tensor([2, 3], 0, 20)}, "tensor w has 20 bytes, F32 of the shape [2, 3] would have 24"),
        ({"w": tensor([2, 3], 0, 6, "F4")}, "tensor w is of the dtype F4"),
        ({"w": tensor([-2, -3], 0, 24)}, "tensor w has 24 bytes"),
        ({"w": {"dtype": "F32"}}, "header of model.safetensors cannot be read"),
        ([], "header of model.safetensors cannot be read"),
    ],
)
def test_a_header_that_does_not_hold_together_is_refused(tmp_path: Path, tensors: Any, said: str) -> None:
    write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(NotWhole) as refused:
        read_tensors(tmp_path)
    assert said in str(refused.value)


@given(st.integers(0, 200))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path = write(folder / "model.safetensors", {"w": tensor([8], 0, 32), "v": tensor([8], 32, 64)}, 64)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(NotWhole, match=r"model\.safetensors"):
        read_header(path)


def test_an_index_is_held_to_its_word(tmp_path: Path) -> None:
    with pytest.raises(NotWhole, match=r"has no \.safetensors file"):
        read_tensors(tmp_path)
    write(tmp_path / "one.safetensors", {"w": tensor([8], 0, 32)})

    def index(weights: dict[str, str]) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    index({"w": "one.safetensors"})
    assert list(read_tensors(tmp_path)) == ["w"]
    index({"w": "one.safetensors", "v": "two.safetensors"})
    with pytest.raises(NotWhole, match=r"two\.safetensors is not there; .* the first v"):
        read_tensors(tmp_path)
    index({"w": "one.safetensors", "v": "one.safetensors"})
    with pytest.raises(NotWhole, match=r"one\.safetensors has no tensor v"):
        read_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(NotWhole, match=r"model\.safetensors\.index\.json cannot be read"):
        read_tensors(tmp_path)


def test_what_the_model_wants_is_checked_by_name(tmp_path: Path) -> None:
    found = read_header(write(tmp_path / "m.safetensors", {"w": tensor([8], 0, 32), "i": tensor([8], 0, 8, "I8")}))
    check(found, {"w": (8,)})
    with pytest.raises(NotWhole, match="tensor v is in none"):
        check(found, {"v": (8,)})
    with pytest.raises(NotWhole, match=r"tensor w has the shape \[8\], config\.json wants \[2, 4\]"):
        check(found, {"w": (2, 4)})
    with pytest.raises(NotWhole, match="tensor i is I8; this engine reads F32"):
        check(found, {"i": (8,)})
