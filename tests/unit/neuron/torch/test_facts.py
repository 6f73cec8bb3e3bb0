from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.safetensors_models import random_model

from helexa.core.errors import BadRequest, NeverLoads
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import ModelFacts, ModelFiles
from helexa.neuron.harness.torch.facts import inspect


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of its own that a test may break."""
    return Path(shutil.copytree(random_model("llama"), tmp_path / "tiny"))


def inspected(folder: Path, **asked: Any) -> ModelFacts:
    return inspect(ModelFiles("tiny", (folder / "model.safetensors",)), LoadRequest(model_id="tiny", **asked))


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_model_is_what_its_small_files_say(folder: Path) -> None:
    found = inspected(folder)
    assert (found.architecture, found.task, found.n_ctx_train) == ("LlamaForCausalLM", "chat", 512)
    assert found.capabilities == ("chat",)
    assert found.size_bytes == (folder / "model.safetensors").stat().st_size
    assert found.n_params == pytest.approx(found.size_bytes / 4, rel=0.05)


def test_a_template_that_knows_tools_and_thoughts_says_so(folder: Path) -> None:
    template = "{% if tools %}{{ tools }}{% endif %}<think>{{ messages }}"
    assert inspected(folder, chat_template=template).capabilities == ("chat", "tools", "reasoning")
    (folder / "chat_template.jinja").write_text(template)
    assert inspected(folder).capabilities == ("chat", "tools", "reasoning")
    assert inspected(folder, capabilities=["chat"]).capabilities == ("chat",)


def test_without_a_template_it_completes(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    del tokenizer["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert (inspected(folder).task, inspected(folder).capabilities) == ("completion", ())
    assert inspected(folder, chat_template="{{ messages }}").task == "chat"
    with pytest.raises(BadRequest, match="no chat template"):
        inspected(folder, task="chat")


def test_an_embedding_model_embeds_and_any_decoder_can_be_asked_to() -> None:
    embeds = inspected(random_model("qwen3-embedding"))
    assert (embeds.task, embeds.capabilities, embeds.extra["pooling"]) == ("embed", ("embed",), "last")
    with pytest.raises(BadRequest, match="only embeds"):
        inspected(random_model("qwen3-embedding"), task="chat")
    assert inspected(random_model("llama"), task="embed").extra["pooling"] == "last"
    with pytest.raises(BadRequest, match="chat, completion, embed"):
        inspected(random_model("llama"), task="rerank")


def test_an_unknown_architecture_is_refused_with_those_that_are_known(folder: Path) -> None:
    change(folder / "config.json", architectures=["MambaForCausalLM"])
    with pytest.raises(NeverLoads, match=r"MambaForCausalLM is not known; known: .*LlamaForCausalLM"):
        inspected(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(NeverLoads, match=r"has no tokenizer\.json"):
        inspected(folder)


def test_weights_that_are_not_whole_are_refused_by_name(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(NeverLoads, match="tensor ") as refused:
        inspected(folder)
    assert refused.value.code == "file_not_whole"
    weights.write_bytes(whole)
    change(folder / "config.json", intermediate_size=201)
    with pytest.raises(NeverLoads, match=r"layers\.0\.mlp\.\w+_proj\.weight has the shape"):
        inspected(folder)
