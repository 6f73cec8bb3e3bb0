"""The exported text, not the calls: what Prometheus reads is what counts."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from helexa.core.discovery import Device, DeviceHealth
from helexa.core.errors import Dialect
from helexa.core.lifecycle import ModelInfo
from helexa.core.relay.contract import Endpoint, Exchange, Usage
from helexa.neuron.kv.store import Figures
from helexa.neuron.metrics import Metrics, tokens_of

CHAT = Endpoint("/v1/chat/completions", Dialect.OPENAI, "/v1/chat/completions")


def metrics(models: list[ModelInfo] | None = None, health: list[DeviceHealth] | None = None) -> Metrics:
    device = Device(index=0, name="CPU", vram_total_mb=8000)
    return Metrics(models=lambda: models or [], devices=lambda: [device], health=lambda: health or [])


def exported(from_metrics: Metrics) -> dict[tuple[str, ...], float]:
    text, media = from_metrics.render()
    assert media.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found[(sample.name, *(value for _, value in sorted(sample.labels.items())))] = sample.value
    return found


def exchange(**fields: Any) -> Exchange:
    made = Exchange(
        endpoint=CHAT,
        head=b"",
        body=b"",
        model="m",
        stream=True,
        wants_usage=False,
        gateway_usage=False,
        request_id="r",
        client="c",
        t_start=1.0,
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_tokens_are_summed_by_model() -> None:
    counted = metrics()
    counted.count("m", exchange(usage=Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=2)))
    counted.count("m", exchange(usage=Usage(prompt_tokens=1, completion_tokens=1)))
    values = exported(counted)
    assert values["neuron_prompt_tokens_total", "m"] == 8
    assert values["neuron_completion_tokens_total", "m"] == 4
    assert values["neuron_prompt_cached_tokens_total", "m"] == 2


def test_without_usage_the_engines_timings_count() -> None:
    used = tokens_of(exchange(timings={"prompt_n": 5, "cache_n": 10, "predicted_n": 4, "predicted_ms": 3.5}))
    assert used == Usage(prompt_tokens=15, completion_tokens=4, cached_tokens=10)


def test_a_client_that_left_is_metered_by_what_passed() -> None:
    assert tokens_of(exchange(client_gone=True, t_first_token=2.0, reads=9)) == Usage(completion_tokens=9)
    assert tokens_of(exchange(client_gone=True, reads=1)) is None


def test_device_memory_is_in_bytes_and_unknown_is_absent() -> None:
    values = exported(metrics(health=[DeviceHealth(index=0, vram_used_mb=3, vram_free_mb=None)]))
    assert values["neuron_device_memory_bytes", "0", "used"] == 3 << 20
    assert values["neuron_device_memory_bytes", "0", "total"] == 8000 << 20
    assert ("neuron_device_memory_bytes", "0", "free") not in values


def test_a_model_is_in_one_state_and_shows_its_requests() -> None:
    values = exported(metrics([ModelInfo(id="m", status="loaded", active_requests=2, queued_requests=1)]))
    states = {key[2]: value for key, value in values.items() if key[0] == "neuron_model_status"}
    assert {state for state, value in states.items() if value} == {"loaded"}
    assert len(states) == 7
    assert values["neuron_active_requests", "m"] == 2
    assert values["neuron_queued_requests", "m"] == 1


def test_a_load_is_timed_once_and_a_drain_that_ran_out_is_none() -> None:
    counted = metrics()
    for status in ("loading", "loaded", "loaded", "unloading", "loaded"):
        counted.saw_model({"id": "m", "status": status, "load_seconds": 0.5})
    values = exported(counted)
    assert values["neuron_model_load_seconds_count", "m"] == 1
    assert values["neuron_model_load_seconds_sum", "m"] == 0.5
    assert values["neuron_model_load_seconds_bucket", "0.25", "m"] == 0
    assert values["neuron_model_load_seconds_bucket", "0.5", "m"] == 1
    assert values["neuron_model_load_seconds_bucket", "+Inf", "m"] == 1


def test_the_kv_store_is_shown_where_there_is_one() -> None:
    kept = Metrics(models=list, devices=list, health=list, kv=lambda: Figures(size_bytes=78, states=2, saved=5))
    values = exported(kept)
    assert values["neuron_kv_store_bytes",] == 78
    assert values["neuron_kv_saved_total",] == 5
    assert ("neuron_kv_store_bytes",) not in exported(metrics())
