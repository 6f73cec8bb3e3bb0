import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.helpers import tiny_gguf

from helexa.neuron.harness.llama.header import TYPES, BadFile, parts_of, read_header, read_model

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


def text(value: str) -> bytes:
    return U64.pack(len(value)) + value.encode()


def header(keys: list[bytes], tensors: list[bytes], *, key_count: int | None = None, version: int = 3) -> bytes:
    count = len(keys) if key_count is None else key_count
    return b"GGUF" + U32.pack(version) + U64.pack(len(tensors)) + U64.pack(count) + b"".join([*keys, *tensors])


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + U32.pack(kind) + value


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + U32.pack(len(shape)) + b"".join(map(U64.pack, shape)) + U32.pack(kind) + U64.pack(offset)


ARCHITECTURE = key("general.architecture", 8, text("llama"))


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def padded(head: bytes, data: int) -> bytes:
    return head + bytes(-len(head) % 32 + data)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.chat_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_every_type_of_the_gguf_package_has_its_block_size() -> None:
    theirs = {int(t): (t.name, *sizes) for t, sizes in gguf.constants.GGML_QUANT_SIZES.items()}
    del theirs[int(gguf.GGMLQuantizationType.Q8_1)]  # only ever inside a computation
    assert {t: TYPES.get(t) for t in theirs} == theirs


def test_a_model_reads_as_the_gguf_package_reads_it(model: Path) -> None:
    ours, theirs = read_header(model), gguf.GGUFReader(model)
    assert ours.metadata["llama.block_count"] == 2
    assert ours.metadata["tokenizer.chat_template"] == tiny_gguf.CHATML
    assert ours.lengths["tokenizer.ggml.tokens"] == len(theirs.fields["tokenizer.ggml.tokens"].data)
    assert [(t.name, t.offset, t.size, list(t.shape)) for t in ours.tensors] == [
        (t.name, t.data_offset, t.n_bytes, [int(n) for n in t.shape]) for t in theirs.tensors
    ]


def test_a_large_vocabulary_is_skipped_in_a_moment(tmp_path: Path) -> None:
    tokens = U32.pack(8) + U64.pack(262_144) + b"".join(text(f"token{i}") for i in range(262_144))
    scores = U32.pack(6) + U64.pack(262_144) + bytes(4 * 262_144)
    keys = [ARCHITECTURE, key("tokens", 9, tokens), key("scores", 9, scores)]
    path = written(tmp_path, header(keys, []))
    began = time.process_time()
    found = read_header(path)
    assert time.process_time() - began < 0.5  # 40 ms where nothing else runs
    assert found.lengths == {"tokens": 262_144, "scores": 262_144}
    assert "tokens" not in found.metadata


def test_a_header_longer_than_the_first_read_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helexa.neuron.harness.llama.header.FIRST_READ", 100)
    path = written(tmp_path, padded(header([ARCHITECTURE, key("a", 8, text("x" * 500))], [tensor("t", [8])]), 32))
    assert read_header(path).metadata["a"] == "x" * 500


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\x80\x02garbage" * 50, "does not begin with GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"tjgg" + bytes(100), "before GGUF"),
        (b"FUGG" + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + U32.pack(1) + bytes(100), "version 1"),
        (b"GGUF" + U32.pack(4) + bytes(100), "version 4"),
        (b"GGUF" + U32.pack(3), "ends within its header"),
        (header([ARCHITECTURE], [], key_count=2), "ends within its header"),
        (header([ARCHITECTURE], [], key_count=1 << 60), "more than a file of"),
        (header([key("a", 8, U64.pack(1 << 40))], []), "claims 1099511627776 bytes"),
        (header([key("a", 8, U64.pack(1 << 23) + b"x")], []), "ends within its header"),
        (header([U64.pack(1 << 62)], [], key_count=1) + bytes(20), "a key claims"),
        (header([key("a", 9, U32.pack(8) + U64.pack(1 << 50))], []), "claims 1125899906842624 strings"),
        (header([key("a", 9, U32.pack(4) + U64.pack(1 << 50))], []), "claims 1125899906842624 elements"),
        (header([key("a", 9, U32.pack(9) + U64.pack(1))], []), "array of an unknown type"),
        (header([key("a", 77, b"")], []), "unknown type (77)"),
        (header([ARCHITECTURE, ARCHITECTURE], []), "twice"),
        (header([key("a", 8, U64.pack(2) + b"\xff\xfe")], []), "not text"),
        (header([key("general.alignment", 4, U32.pack(24))], []), "not a power of two"),
        (header([], [tensor("t", [4] * 5)]), "5 dimensions"),
        (header([], [tensor("t", [32], kind=9)]), "type 9"),
        (header([], [tensor("t", [33], kind=2)]), "not a multiple of 32"),
        (header([], [tensor("t", [4]), tensor("t", [4], offset=32)]), "twice"),
        (header([], [tensor("t", [4], offset=32)]), "not at 0"),
        (header([], [tensor("t", [4]), tensor("u", [4], offset=0)]), "not at 32"),
        (header([], [tensor("t", [1 << 40, 1 << 20])]), "download it again"),
    ],
)
def test_a_file_that_is_no_whole_model_is_refused_with_words(tmp_path: Path, data: bytes, words: str) -> None:
    path = written(tmp_path, data)
    with pytest.raises(BadFile) as refused:
        read_header(path)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_truncated_model_is_refused_with_both_figures(tmp_path: Path, model: Path) -> None:
    whole = model.read_bytes()
    path = written(tmp_path, whole[:-1000])
    with pytest.raises(BadFile, match=rf"needs {len(whole)} bytes, the file has {len(whole) - 1000}: download it"):
        read_header(path)


def test_every_cut_of_a_header_is_refused(tmp_path: Path) -> None:
    whole = padded(header([ARCHITECTURE, key("n", 4, U32.pack(7))], [tensor("t", [8])]), 32)
    assert read_header(written(tmp_path, whole)).metadata["n"] == 7
    for cut in range(len(whole)):
        with pytest.raises(BadFile):
            read_header(written(tmp_path, whole[:cut]))


def test_damage_anywhere_in_a_header_never_does_worse_than_a_refusal(tmp_path: Path) -> None:
    whole = bytearray(padded(header([ARCHITECTURE, key("n", 4, U32.pack(7))], [tensor("t", [8])]), 32))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(4, len(damaged))] = rng.integers(256)
        try:
            read_header(written(tmp_path, bytes(damaged)))
        except BadFile:
            continue


def test_a_split_model_is_read_with_all_its_parts(tmp_path: Path) -> None:
    parts = tiny_gguf.split_model(tmp_path, 3)
    assert parts_of(parts[0]) == parts
    headers = read_model(parts)
    assert sum(len(h.tensors) for h in headers) == 21


def test_a_split_model_without_one_of_its_parts_is_refused_by_name(tmp_path: Path) -> None:
    parts = tiny_gguf.split_model(tmp_path, 3)
    with pytest.raises(BadFile, match=r"split into 3 files; missing: tiny-00002-of-00003\.gguf"):
        read_model((parts[0], parts[2]))
    with pytest.raises(BadFile, match="missing"):
        read_model(parts[:1])


def test_parts_in_each_others_place_are_refused(tmp_path: Path) -> None:
    first, second = tiny_gguf.split_model(tmp_path, 2)
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(BadFile, match="another part"):
        read_model((first, second))
