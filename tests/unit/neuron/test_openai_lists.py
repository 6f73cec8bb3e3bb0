"""docs/reference/openai.md has the lists that the code has, and the lists have every field that is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from tests.helpers.exchanges import exchange, session

from helexa.core.errors import BadRequest
from helexa.neuron.harness import openai_fields as fields
from helexa.neuron.harness import openai_lists as lists

PAGE = (Path(__file__).parents[3] / "docs/reference/openai.md").read_text()
HEADINGS = {
    lists.CHAT: "Chat completions",
    lists.COMPLETIONS: "Completions",
    lists.EMBEDDINGS: "Embeddings",
    lists.RERANK: "Rerank",
}
READ: dict[str, type[msgspec.Struct]] = {
    lists.CHAT: fields.ChatRequest,
    lists.COMPLETIONS: fields.CompletionRequest,
    lists.EMBEDDINGS: fields.EmbeddingRequest,
    lists.RERANK: fields.RerankRequest,
}
OPENAIS: dict[str, Any] = {
    lists.CHAT: chat_create_params.CompletionCreateParamsBase,
    lists.COMPLETIONS: completion_create_params.CompletionCreateParamsBase,
    lists.EMBEDDINGS: embedding_create_params.EmbeddingCreateParams,
}
# Engine options that are judged so that none takes a node down; told nowhere else.
JUDGED = {"dry_penalty_last_n", "n_probs", "n_cmpl"}
UNWANTED: dict[str, Any] = {
    "audio": {"voice": "a"},
    "web_search_options": {},
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "store": True,
    "rank_fields": ["title"],
    "return_embeddings": True,
}
BODIES: dict[str, dict[str, Any]] = {
    lists.CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    lists.RERANK: {"query": "a", "documents": ["b"]},
}


def listed(path: str, heading: str) -> set[str]:
    part = f"\n{PAGE}".split(f"\n## {HEADINGS[path]}\n", 1)[1].split("\n## ", 1)[0]
    _, found, table = part.partition(f"### {heading}\n")
    rows = [line.split("|")[1] for line in table.split("\n### ", 1)[0].splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)} if found else set()


@pytest.mark.parametrize("path", HEADINGS)
def test_each_list_of_each_endpoint_is_documented(path: str) -> None:
    assert listed(path, "Honoured") == lists.HONOURED[path]
    assert listed(path, "Dropped") == set(lists.DROPPED[path])
    assert listed(path, "Refused") == set(lists.REFUSED[path])


@pytest.mark.parametrize("path", HEADINGS)
def test_every_field_that_is_read_and_every_one_of_openai_s_stands_on_one_list(path: str) -> None:
    named = [*lists.HONOURED[path], *lists.DROPPED[path], *lists.REFUSED[path]]
    assert len(named) == len(set(named))
    assert set(READ[path].__struct_fields__) - JUDGED <= set(named)
    assert set(getattr(OPENAIS.get(path), "__annotations__", {})) - {"extra_body"} <= set(named)


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in BODIES for name in lists.DROPPED[path]])
def test_what_is_dropped_is_named_unless_it_asks_for_the_ordinary(path: str, name: str) -> None:
    served = session("rerank" if path == lists.RERANK else "chat")
    asked = {**BODIES[path], name: "other"}
    assert served.prepare(exchange(asked, path)).dropped == (name,)
    for ordinary in (None, *lists.ORDINARY.get(name, ())):
        assert served.prepare(exchange({**BODIES[path], name: ordinary}, path)).dropped == ()


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in lists.REFUSED.items() for name in names])
def test_what_is_refused_is_named(path: str, name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        session("rerank" if path == lists.RERANK else "chat").prepare(
            exchange({**BODIES[path], name: UNWANTED[name]}, path)
        )
    assert refused.value.param == name
