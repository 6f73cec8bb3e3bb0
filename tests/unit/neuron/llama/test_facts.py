from pathlib import Path

import pytest
from tests.helpers import tiny_gguf

from helexa.core.errors import BadRequest, NeverLoads
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import ModelFiles
from helexa.neuron.harness.llama import LlamaHarness

HARNESS = LlamaHarness()


def inspect(*files: Path, lora: tuple[Path, ...] = (), projector: Path | None = None, **profile: object):
    found = ModelFiles("tiny", files, lora=lora, projector=projector, draft=profile.pop("draft_file", None))
    return HARNESS.inspect(found, LoadRequest(model_id="tiny", **profile))


def test_a_chat_model_says_what_it_is(tmp_path: Path) -> None:
    path = tiny_gguf.chat_model(tmp_path / "tiny.gguf")
    facts = inspect(path)
    assert (facts.architecture, facts.task, facts.n_ctx_train, facts.quant) == ("llama", "chat", 2048, "F32")
    assert facts.size_bytes == path.stat().st_size
    assert facts.capabilities == ("chat",)
    assert facts.n_params == pytest.approx(path.stat().st_size / 4, rel=0.05)


@pytest.mark.parametrize(
    ("template", "task", "capabilities"),
    [
        (None, "completion", ()),
        ("{% for tool in tools %}{{ tool }}{% endfor %}", "chat", ("chat", "tools")),
        ("{{ '<think>' if enable_thinking }}", "chat", ("chat", "reasoning")),
    ],
)
def test_capabilities_are_those_of_the_template(
    tmp_path: Path, template: str | None, task: str, capabilities: tuple[str, ...]
) -> None:
    facts = inspect(tiny_gguf.chat_model(tmp_path / "tiny.gguf", template=template))
    assert (facts.task, facts.capabilities) == (task, capabilities)


def test_a_template_of_the_profile_counts_for_the_models_own(tmp_path: Path) -> None:
    path = tiny_gguf.chat_model(tmp_path / "tiny.gguf", template=None)
    assert inspect(path, chat_template="{{ tools }}").capabilities == ("chat", "tools")


def test_pooling_and_classifier_tell_embedding_and_rerank_models(tmp_path: Path) -> None:
    embed = inspect(tiny_gguf.embedding_model(tmp_path / "e.gguf"))
    rerank = inspect(tiny_gguf.rerank_model(tmp_path / "r.gguf"))
    assert (embed.task, embed.capabilities) == ("embed", ("embed",))
    assert (rerank.task, rerank.capabilities) == ("rerank", ("rerank",))


def test_a_chat_model_can_be_told_to_embed_but_a_bert_cannot_chat(tmp_path: Path) -> None:
    assert inspect(tiny_gguf.chat_model(tmp_path / "c.gguf"), task="embed").capabilities == ("embed",)
    bert = tiny_gguf.embedding_model(tmp_path / "e.gguf")
    with pytest.raises(BadRequest, match="only embeds or ranks") as refused:
        inspect(bert, task="chat")
    assert refused.value.param == "task"
    with pytest.raises(BadRequest, match="no classification head"):
        inspect(bert, task="rerank")
    with pytest.raises(BadRequest, match="is not known; use one of chat"):
        inspect(bert, task="sing")


def test_projector_and_adapter_are_no_models_and_say_so(tmp_path: Path) -> None:
    with pytest.raises(NeverLoads, match="is a projector"):
        inspect(tiny_gguf.projector(tmp_path / "p.gguf"))
    with pytest.raises(NeverLoads, match="is a LoRA adapter"):
        inspect(tiny_gguf.lora_adapter(tmp_path / "l.gguf"))


def test_a_projector_gives_vision(tmp_path: Path) -> None:
    model, eye = tiny_gguf.chat_model(tmp_path / "c.gguf"), tiny_gguf.projector(tmp_path / "p.gguf")
    assert inspect(model, projector=eye).capabilities == ("chat", "vision")


def test_companions_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    model, eye = tiny_gguf.chat_model(tmp_path / "c.gguf"), tiny_gguf.projector(tmp_path / "p.gguf")
    adapter = tiny_gguf.lora_adapter(tmp_path / "l.gguf")
    with pytest.raises(NeverLoads, match="is no projector"):
        inspect(model, projector=model)
    with pytest.raises(NeverLoads, match="is no LoRA adapter"):
        inspect(model, lora=(eye,))
    with pytest.raises(NeverLoads, match="a draft must be a model"):
        inspect(model, draft_file=eye)
    with pytest.raises(NeverLoads, match="adapter is for llama models"):
        inspect(tiny_gguf.embedding_model(tmp_path / "e.gguf"), lora=(adapter,))


def test_what_is_not_whole_never_loads_and_says_so(tmp_path: Path) -> None:
    path = tiny_gguf.chat_model(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(NeverLoads, match="download it again") as refused:
        inspect(path)
    assert refused.value.code == "file_not_whole"
    with pytest.raises(NeverLoads, match="No such file"):
        inspect(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_count", 0), ("block_count", 1000), ("context_length", 0), ("context_length", 1 << 31)],
)
def test_figures_at_which_the_engine_would_abort_are_refused(tmp_path: Path, key: str, value: int) -> None:
    path = tiny_gguf.chat_model(tmp_path / "tiny.gguf")
    data = bytearray(path.read_bytes())
    at = data.find(b"llama." + key.encode()) + len("llama.") + len(key) + 4
    data[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(NeverLoads, match=f"{key} is {value}"):
        inspect(path)


def test_capabilities_of_the_profile_replace_what_the_template_shows(tmp_path: Path) -> None:
    path = tiny_gguf.chat_model(tmp_path / "tiny.gguf")
    assert inspect(path, capabilities=["chat", "tools"]).capabilities == ("chat", "tools")
