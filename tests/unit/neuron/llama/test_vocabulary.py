from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers import tiny_gguf

from helexa.neuron.harness.llama.header import BadFile, raw_metadata, read_header
from helexa.neuron.harness.llama.vocabulary import write_vocabulary

LAYOUT = ("general.architecture", "general.alignment", "llama.", "split.")


def test_it_is_a_whole_model_with_all_that_the_tokenizer_and_the_template_are(tmp_path: Path) -> None:
    """The engine itself reads it in tests/e2e/test_counting.py."""
    source = tiny_gguf.chat_model(tmp_path / "m.gguf", **{"tokenizer.ggml.add_bos_token": True})
    made = tmp_path / "v.gguf"
    write_vocabulary(source, made)
    before, after = raw_metadata(source), raw_metadata(made)
    kept = {key: raw for key, raw in before.items() if not key.startswith(LAYOUT)}
    assert {key: after.get(key) for key in kept} == kept
    assert {"tokenizer.chat_template", "tokenizer.ggml.tokens", "tokenizer.ggml.add_bos_token"} <= kept.keys()
    header = read_header(made)  # which checks that every tensor lies within the file
    assert header.metadata["llama.block_count"] == 1
    assert header.tensors[0].shape == (32, header.lengths["tokenizer.ggml.tokens"])
    assert made.stat().st_size < 64 << 10


def test_the_first_part_of_a_split_model_is_enough(tmp_path: Path) -> None:
    first, *_ = tiny_gguf.split_model(tmp_path)
    write_vocabulary(first, tmp_path / "v.gguf")
    assert not any(key.startswith("split.") for key in raw_metadata(tmp_path / "v.gguf"))


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no tokenizer"):
        write_vocabulary(tiny_gguf.projector(tmp_path / "p.gguf"), tmp_path / "v.gguf")
