"""The text that Prometheus reads, from exchanges as the relay leaves them."""

from __future__ import annotations

from typing import Any

import pytest

from helexa.core.errors import Dialect, UpstreamError
from helexa.core.relay.contract import Endpoint, Exchange, Usage
from helexa.cortex.metrics import Metrics

CHAT = Endpoint("/v1/chat/completions", Dialect.OPENAI, "/v1/chat/completions")
LABELS = '{model="m",node="beast"}'


def exchange(**fields: Any) -> Exchange:
    made = Exchange(
        endpoint=CHAT, head=b"", body=b"", model="m", stream=True, wants_usage=False, gateway_usage=False,
        request_id="r", client="127.0.0.1", t_start=100.0,
    )  # fmt: skip
    for name, value in {"status": 200, "t_end": 102.0, **fields}.items():
        setattr(made, name, value)
    return made


def samples(metrics: Metrics, **node_up: bool) -> dict[str, float]:
    lines = metrics.render(node_up).decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def recorded(*exchanges: Exchange) -> dict[str, float]:
    metrics = Metrics()
    for each in exchanges:
        metrics.record(each, metrics.series("m", "beast"))
    return samples(metrics)


def test_every_metric_of_the_contract_is_exported_under_its_name() -> None:
    metrics = Metrics()
    metrics.record(exchange(), metrics.series("m", "beast"))
    types = {tuple(line.split()[2:4]) for line in metrics.render({}).decode().splitlines() if line.startswith("# TYPE")}
    assert types == {
        ("cortex_requests_total", "counter"),
        ("cortex_request_duration_seconds", "histogram"),
        ("cortex_time_to_first_token_seconds", "histogram"),
        ("cortex_output_tokens_per_second", "histogram"),
        ("cortex_tokens_total", "counter"),
        ("cortex_queue_wait_seconds", "histogram"),
        ("cortex_inflight_requests", "gauge"),
        ("cortex_cold_starts_total", "counter"),
        ("cortex_model_load_seconds", "histogram"),
        ("cortex_routing_choices_total", "counter"),
        ("cortex_upstream_errors_total", "counter"),
        ("cortex_node_up", "gauge"),
    }


def test_a_request_is_counted_by_model_node_endpoint_and_status() -> None:
    found = recorded(exchange(), exchange(), exchange(status=400))
    line = 'cortex_requests_total{endpoint="/v1/chat/completions",model="m",node="beast",status="%s"}'
    assert (found[line % 200], found[line % 400]) == (2, 1)


def test_buckets_are_cumulative_and_a_value_on_a_bound_is_below_it() -> None:
    found = recorded(exchange(t_end=100.005), exchange(t_end=101.0), exchange(t_end=1000.0))
    bucket = 'cortex_request_duration_seconds_bucket{le="%s",model="m",node="beast"}'
    assert [found[bucket % le] for le in ("0.01", "0.5", "1.0", "600.0", "+Inf")] == [1, 1, 2, 2, 3]
    assert found[f"cortex_request_duration_seconds_count{LABELS}"] == 3
    assert found[f"cortex_request_duration_seconds_sum{LABELS}"] == pytest.approx(901.005)


def test_a_request_that_generated_nothing_has_no_time_to_a_first_token() -> None:
    assert not any(name.startswith("cortex_time_to_first_token_seconds_") for name in recorded(exchange()))


def test_the_first_token_counts_from_the_head() -> None:
    found = recorded(exchange(t_first_byte=100.1, t_first_token=100.4))
    assert found[f"cortex_time_to_first_token_seconds_sum{LABELS}"] == pytest.approx(0.4)


def test_the_engines_own_speed_goes_before_what_was_seen() -> None:
    usage = Usage(prompt_tokens=7, completion_tokens=11)
    found = recorded(exchange(usage=usage, t_first_token=101.0, timings={"predicted_n": 11, "predicted_ms": 110.0}))
    assert found[f"cortex_output_tokens_per_second_sum{LABELS}"] == pytest.approx(100.0)


def test_without_an_engines_word_the_speed_is_that_of_the_tokens_after_the_first() -> None:
    found = recorded(exchange(usage=Usage(prompt_tokens=7, completion_tokens=11), t_first_token=101.0))
    assert found[f"cortex_output_tokens_per_second_sum{LABELS}"] == pytest.approx(10.0)


def test_tokens_are_counted_by_direction() -> None:
    found = recorded(exchange(usage=Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=5)))
    name = 'cortex_tokens_total{direction="%s",model="m",node="beast"}'
    assert [found[name % d] for d in ("prompt", "completion", "cached")] == [7, 3, 5]


def test_a_client_that_left_before_usage_came_is_metered_by_what_passed() -> None:
    found = recorded(exchange(client_gone=True, t_first_token=100.5, reads=9))
    assert found['cortex_tokens_total{direction="completion",model="m",node="beast"}'] == 9
    assert found['cortex_requests_total{endpoint="/v1/chat/completions",model="m",node="beast",status="499"}'] == 1


def test_a_stream_that_broke_off_is_no_success_although_its_status_was_200() -> None:
    found = recorded(exchange(error=UpstreamError("gone")))
    assert found['cortex_requests_total{endpoint="/v1/chat/completions",model="m",node="beast",status="502"}'] == 1


def test_a_refusal_that_was_passed_on_keeps_its_own_status() -> None:
    found = recorded(exchange(status=400, error=UpstreamError("beast answered 400")))
    assert found['cortex_requests_total{endpoint="/v1/chat/completions",model="m",node="beast",status="400"}'] == 1


def test_a_label_with_quotes_and_line_breaks_cannot_break_the_text() -> None:
    metrics = Metrics()
    metrics.cold_start('a"b\nc')
    assert 'cortex_cold_starts_total{model="a\\"b\\nc"} 1.0' in metrics.render({}).decode()


def test_loads_waits_errors_and_nodes_have_their_series() -> None:
    metrics = Metrics()
    metrics.loaded("m", "beast", 12.0)
    metrics.waited("m", 3.0)
    metrics.upstream_error("beast", "connect")
    found = samples(metrics, beast=True, benjy=False)
    assert found[f"cortex_model_load_seconds_sum{LABELS}"] == 12
    assert found['cortex_queue_wait_seconds_bucket{le="5.0",model="m"}'] == 1
    assert found['cortex_upstream_errors_total{kind="connect",node="beast"}'] == 1
    assert (found['cortex_node_up{node="beast"}'], found['cortex_node_up{node="benjy"}']) == (1, 0)
