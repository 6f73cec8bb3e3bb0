"""Tokens are counted for models that are not loaded, and exactly as their loaded engines count them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.gateway import PATIENT, cortex_process
from tests.helpers.models import gemma, smollm2
from tests.helpers.neuron_daemon import Daemon, neuron

# Two tokenizers of different kinds, and for each a template of its own making too.
CATALOGUE = """
[[models]]
id = "plain"
source = "{smollm2}"
context = 1024
slots = 1
threads = 1

[[models]]
id = "tooled"
source = "{smollm2}"
context = 1024
slots = 1
threads = 1
chat_template = '''
{{%- if tools %}}<tools>{{% for tool in tools %}}{{{{ tool | tojson }}}}{{% endfor %}}</tools>{{% endif %}}
{{%- for m in messages %}}<|im_start|>{{{{ m.role }}}}: {{{{ m.content or '' }}}}
{{%- for call in m.tool_calls or [] %}}<tool_call>{{{{ call | tojson }}}}</tool_call>{{% endfor %}}<|im_end|>
{{%- endfor %}}
{{%- if add_generation_prompt %}}<|im_start|>assistant: {{% endif %}}'''

[[models]]
id = "gemma"
source = "{gemma}"
context = 1024
slots = 1
threads = 1
chat_template = '''
{{%- for m in messages %}}<start_of_turn>{{{{ m.role }}}} {{{{ m.content }}}}<end_of_turn>\\n{{% endfor %}}'''

[[models]]
id = "nowhere"
source = "somebody/NoSuchModel-GGUF"
"""
MODELS = ("plain", "tooled", "gemma")
WEATHER = {"name": "get_weather", "description": "The weather.", "input_schema": {"type": "object", "properties": {}}}
BODIES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Name a colour."}]},
    {
        "system": "You are brief.\n\n\tÜñïcödé 你好 👩‍👩‍👧 <|im_end|>  ",
        "messages": [{"role": "user", "content": "  What is the weather\r\nin Rome?"}],
        "tools": [WEATHER],
    },
]

pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True)
class Site:
    node: Daemon
    gateway: Daemon

    def count(self, model: str, body: dict[str, Any]) -> int:
        answer = self.gateway.http.post("/v1/messages/count_tokens", json={"model": model, **body})
        assert answer.status == 200, answer.text
        found: int = answer.json()["input_tokens"]
        return found

    def prompt(self, model: str, body: dict[str, Any]) -> int:
        """Prompt tokens of the request itself."""
        answer = self.gateway.http.post("/v1/messages", json={"model": model, "max_tokens": 1, **body})
        assert answer.status == 200, answer.text
        usage = answer.json()["usage"]
        found: int = usage["input_tokens"] + usage["cache_read_input_tokens"]
        return found

    def touched(self) -> set[str]:
        """Models that are not as they lie on disk."""
        return {m["id"] for m in self.node.http.get("/models").json() if m["status"] != "unloaded" or "last_used" in m}


@pytest.fixture(params=["process", "none"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    settings = f'isolation = "{request.param}"\nallow_downloads = false\nmemory_limit_mb = [1000]'
    models = CATALOGUE.format(smollm2=smollm2(), gemma=gemma())
    with (
        neuron(tmp_path, settings) as node,
        cortex_process(tmp_path, {"one": node.url}, toml=PATIENT, models=models) as gateway,
    ):
        yield Site(node, gateway)


def test_a_count_is_the_request_s_own_and_loads_nothing(site: Site) -> None:
    unloaded = [[site.count(model, body) for body in BODIES] for model in MODELS]
    assert site.touched() == set()
    free = site.node.http.get("/health").json()["devices"][0]["vram_free_mb"]
    assert free == 1000  # a load may have it all
    for model, counts in zip(MODELS, unloaded, strict=True):
        assert [site.prompt(model, body) for body in BODIES] == counts, model
        used = site.node.http.get("/models").json()
        assert [site.count(model, body) for body in BODIES] == counts, model  # now by its own engine
        assert [m.get("last_used") for m in site.node.http.get("/models").json()] == [m.get("last_used") for m in used]


def test_what_is_on_no_disk_is_said_to_be_and_what_cannot_be_counted_is_refused(site: Site) -> None:
    lost = site.gateway.http.post("/v1/messages/count_tokens", json={"model": "nowhere", **BODIES[0]})
    assert (lost.status, lost.json()["error"]["type"]) == (503, "api_error")
    assert "nowhere cannot be counted" in lost.json()["error"]["message"]
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    body = {"model": "plain", "messages": [{"role": "user", "content": [picture]}]}
    assert site.gateway.http.post("/v1/messages/count_tokens", json=body).status == 400
    named = {"model": "plain", "profile": {"model_id": "plain", "source": str(smollm2())}}
    direct = site.node.http.post("/v1/tokens/count", json={**named, "messages": BODIES[0]["messages"]})
    assert direct.json() == {"input_tokens": site.count("plain", BODIES[0])}
    assert site.touched() == set()
