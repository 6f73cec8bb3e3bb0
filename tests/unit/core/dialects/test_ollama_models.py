"""The fleet's models in Ollama's shape, read strictly by its package."""

from __future__ import annotations

from typing import Any

from ollama import ListResponse, ProcessResponse, ShowResponse
from tests.helpers.strictly import strictly

from helexa.core.dialects.ollama_models import Running, running, show, tag
from helexa.core.lifecycle import ModelInfo

ENTRY: dict[str, Any] = {
    "id": "owner/small",
    "created": 1_764_000_000,
    "max_model_len": 4096,
    "meta": {"n_ctx": 4096, "n_ctx_train": 8192, "n_params": 134_515_008, "size": 105_454_432},
    "capabilities": ["chat", "tools", "reasoning", "vision"],
}
SAID = [ModelInfo(id="a", status="loaded"), ModelInfo(id="a", status="unloaded", architecture="llama", quant="Q4_K_M")]
UNKNOWN: dict[str, Any] = {"id": "new", "created": 1_764_000_000}


def test_a_model_is_listed_by_its_id_with_what_is_known() -> None:
    found = tag(ENTRY, SAID)
    strictly(ListResponse, {"models": [found]}, beside={"models.name", "models.capabilities"})
    assert (found["name"], found["model"], found["size"]) == ("owner/small", "owner/small", 105_454_432)
    assert found["details"] == {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "134.52M",
        "quantization_level": "Q4_K_M",
    }
    assert found["capabilities"] == ["completion", "tools", "thinking", "vision"]


def test_a_model_of_which_nothing_is_known_is_listed_all_the_same() -> None:
    strictly(ListResponse, {"models": [tag(UNKNOWN, [])]}, beside={"models.name"})
    strictly(ShowResponse, show(UNKNOWN, []))
    assert tag(UNKNOWN, [])["details"] == {"parent_model": "", "format": "gguf"}


def test_the_digest_changes_with_what_is_served_and_with_nothing_else() -> None:
    assert tag(ENTRY, SAID)["digest"] == running(ENTRY, SAID, Running(1, 1, None))["digest"]
    other = [ModelInfo(id="a", status="loaded", quant="Q8_0")]
    assert len({tag(ENTRY, SAID)["digest"], tag(ENTRY, other)["digest"], tag(UNKNOWN, [])["digest"]}) == 3


def test_what_is_shown_of_a_model_has_the_context_that_a_request_may_have() -> None:
    found = show(ENTRY, SAID)
    strictly(ShowResponse, found)
    assert found["model_info"]["general.architecture"] == "llama"
    assert found["model_info"]["llama.context_length"] == 4096
    assert found["parameters"] == "num_ctx 4096"


def test_a_model_that_only_completes_says_so() -> None:
    assert show(UNKNOWN, [ModelInfo(id="new", status="loaded", task="completion")])["capabilities"] == ["completion"]


def test_a_running_model_tells_its_memory_and_when_it_goes() -> None:
    found = running(ENTRY, SAID, Running(size_mb=300, vram_mb=100, expires_at=1_764_000_060.4))
    strictly(ProcessResponse, {"models": [found]})
    assert (found["size"], found["size_vram"]) == (300 << 20, 100 << 20)
    assert (found["expires_at"], found["context_length"]) == ("2025-11-24T16:01:00Z", 4096)
    assert running(ENTRY, SAID, Running(1, 1, None))["expires_at"].startswith("2318-")
