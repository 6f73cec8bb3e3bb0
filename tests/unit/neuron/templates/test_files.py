from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.conversations import TOOL, user

from helexa.neuron.harness.templates.files import FolderUnreadable, read_folder

SPECIAL = {
    "bos_token": {"__type": "AddedToken", "content": "<s>"},
    "eos_token": "</s>",
    "image_token": "<image>",
    "extra_special_tokens": {"think_token": "<think>"},
}
TEMPLATE = "{{ bos_token }}{{ image_token }}{{ think_token }}{{ messages[0].content }}{{ eos_token }}"


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, {}),
        ({"tokenizer_config.json": {"chat_template": "A"}}, {"default": "A"}),
        (
            {"tokenizer_config.json": {"chat_template": "A"}, "chat_template.json": {"chat_template": "B"}},
            {"default": "B"},
        ),
        ({"tokenizer_config.json": {"chat_template": "A"}, "chat_template.jinja": "C"}, {"default": "C"}),
        (
            {"chat_template.jinja": "C", "additional_chat_templates/tool_use.jinja": "D"},
            {"default": "C", "tool_use": "D"},
        ),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "default", "template": "A"}, {"name": "rag", "template": "R"}]
                }
            },
            {"default": "A", "rag": "R"},
        ),
        ({"tokenizer_config.json": {"chat_template": None}}, {}),
    ],
)
def test_the_template_is_found_where_transformers_finds_it(tmp_path: Path, files: dict[str, Any], wanted: Any) -> None:
    assert read_folder(write(tmp_path, files)).templates == wanted


def test_special_tokens_are_texts_however_they_are_written(tmp_path: Path) -> None:
    found = read_folder(
        write(tmp_path, {"tokenizer_config.json": SPECIAL, "special_tokens_map.json": {"unk_token": "?"}})
    )
    assert found.special == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "image_token": "<image>",
        "think_token": "<think>",
        "unk_token": "?",
    }


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "[" * 100000])
def test_a_file_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(FolderUnreadable, match=r"tokenizer_config\.json"):
        read_folder(write(tmp_path, {"tokenizer_config.json": content}))


def test_a_folder_is_rendered_as_its_tokenizer_does(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from helexa.neuron.harness.templates.template import ChatTemplate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import PreTrainedTokenizerFast

        words = {"<s>": 0, "</s>": 1, "<image>": 2, "<think>": 3, "x": 4}
        tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "x")).save(str(tmp_path / "tokenizer.json"))
        write(
            tmp_path,
            {
                "tokenizer_config.json": {**SPECIAL, "tokenizer_class": "PreTrainedTokenizerFast"},
                "chat_template.jinja": TEMPLATE,
                "additional_chat_templates/tool_use.jinja": "{{ tools | tojson }}" + TEMPLATE,
            },
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    found = read_folder(tmp_path)
    template = ChatTemplate(found.templates, found.special)
    for tools in (None, [TOOL]):
        wanted = tokenizer.apply_chat_template([user("é")], tools=tools, tokenize=False)
        assert template.render([user("é")], tools=tools, add_generation_prompt=False) == wanted
