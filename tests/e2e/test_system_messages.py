"""What becomes of system messages between the others, by the model's template, as the engine renders it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers.aio import run
from tests.helpers.exchanges import exchange
from tests.helpers.llama_engine import KEY, engine

from helexa.core.relay.upstream import Upstream

_EACH = "<{{ m.role }}>{{ m.content }}"
STANDS = "{% for m in messages %}" + _EACH + "{% endfor %}"
RAISES = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}" + _EACH + "{% endfor %}"
)
DROPS = "{% for m in messages %}{% if m.role != 'system' or loop.first %}" + _EACH + "{% endif %}{% endfor %}"
ALTERNATES = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}" + _EACH + "{% endfor %}"
)
# As Claude Code sends them in its first turn.
MESSAGES = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "Hi"},
    {"role": "system", "content": "It is Monday."},
]


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        pytest.param(STANDS, "<system>Be brief.\n<user>Hi<system>It is Monday.", id="stands"),
        pytest.param(RAISES, "<system>Be brief.\n\n\nIt is Monday.<user>Hi", id="raises"),
        pytest.param(DROPS, "<system>Be brief.\n\n\nIt is Monday.<user>Hi", id="drops"),
        pytest.param(ALTERNATES, "<system>Be brief.\n\n\nIt is Monday.<user>Hi", id="alternates"),
    ],
)
def test_they_stand_where_the_template_shows_them_and_else_in_the_first(
    template: str, rendered: str, tmp_path: Path
) -> None:
    async def scenario(address: str) -> str:
        upstream = Upstream("engine", address, headers={"authorization": f"Bearer {KEY}"})
        try:
            await session.learn(upstream)
            body = session.prepare(exchange({"messages": MESSAGES, "stream": True})).body
            assert body is not None
            prompt: str = (await upstream.fetch("POST", "/apply-template", body)).json()["prompt"]
            counted = await session.count_tokens(json.dumps({"messages": MESSAGES}).encode(), upstream)
            order = json.dumps({"content": rendered, "add_special": True, "parse_special": True}).encode()
            assert counted == len((await upstream.fetch("POST", "/tokenize", order)).json()["tokens"])
            return prompt
        finally:
            upstream.close()

    with engine(tmp_path, chat_template=template) as (address, session):
        assert run(scenario(address), timeout_s=30) == rendered
