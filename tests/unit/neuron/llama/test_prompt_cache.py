"""What a saved slot of llama.cpp depends on, and what its file begins with."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helexa.core.lifecycle import Estimate, LoadRequest
from helexa.neuron.harness.base import CACHE_BLOCK, CacheFailed, ModelFacts, ModelFiles, Plan
from helexa.neuron.harness.llama.prompt_cache import MATTERS, LlamaPromptCache, blocks_of, can_save

OPTIONS: dict[str, Any] = dict.fromkeys(MATTERS, 1) | {"threads": 2, "batch": 64, "tensor_split": [0.5, 0.5]}


def plan(task: str = "chat", files: ModelFiles | None = None, **options: Any) -> Plan:
    return Plan(
        request=LoadRequest(model_id="m"),
        files=files or ModelFiles("m", (Path("m.gguf"),)),
        facts=ModelFacts("llama", task, 4096, 1, 1, None, ()),
        estimate=Estimate(devices=[]),
        context=1024,
        slots=2,
        device_indices=(0,),
        extra=OPTIONS | options,
    )


def saved(folder: Path, tokens: list[int], *, version: int = 1) -> Path:
    file = folder / "state"
    packed = [0xFFFFFFFF, version, len(tokens), *tokens, 0]
    file.write_bytes(b"qsgg" + struct.pack(f"<{len(packed) + 2}I", 4, len(packed), *packed) + b"the cache itself")
    return file


@pytest.mark.parametrize("option", MATTERS)
def test_a_state_is_for_these_settings_alone(option: str) -> None:
    assert LlamaPromptCache(plan(), "1").fingerprint != LlamaPromptCache(plan(**{option: 2}), "1").fingerprint


def test_another_version_of_the_engine_takes_no_states_and_another_number_of_threads_does() -> None:
    assert LlamaPromptCache(plan(), "1").fingerprint != LlamaPromptCache(plan(), "2").fingerprint
    assert LlamaPromptCache(plan(), "1").fingerprint == LlamaPromptCache(plan(threads=9, batch=8), "1").fingerprint


def test_only_what_generates_from_text_alone_is_saved() -> None:
    files = ModelFiles("m", (Path("m.gguf"),))
    assert can_save(plan())
    assert can_save(plan("completion"))
    assert not can_save(plan("embed"))
    assert not can_save(plan(files=replace(files, projector=Path("p.gguf"))))
    assert not can_save(plan(files=replace(files, draft=Path("d.gguf"))))


def test_a_longer_conversation_begins_with_the_blocks_of_the_shorter(tmp_path: Path) -> None:
    tokens = list(range(3 * CACHE_BLOCK + 5))
    longer = blocks_of(saved(tmp_path, tokens), len(tokens))
    shorter = blocks_of(saved(tmp_path, tokens[: 2 * CACHE_BLOCK]), 2 * CACHE_BLOCK)
    other = blocks_of(saved(tmp_path, [9, *tokens[1:]]), len(tokens))
    assert len(longer) == 3
    assert longer[:2] == shorter
    assert not set(longer) & set(other)


def test_a_file_that_begins_otherwise_has_no_blocks(tmp_path: Path) -> None:
    tokens = list(range(CACHE_BLOCK))
    assert blocks_of(saved(tmp_path, tokens, version=2), len(tokens)) == ()
    assert blocks_of(saved(tmp_path, tokens), len(tokens) + 1) == ()


def test_a_file_that_is_cut_short_is_a_failure(tmp_path: Path) -> None:
    file = saved(tmp_path, list(range(CACHE_BLOCK)))
    with pytest.raises(CacheFailed, match="disk full"):
        blocks_of(file, CACHE_BLOCK, at_least_bytes=file.stat().st_size + 1)
    file.write_bytes(b"qsg")
    with pytest.raises(CacheFailed, match="no state"):
        blocks_of(file, CACHE_BLOCK)
