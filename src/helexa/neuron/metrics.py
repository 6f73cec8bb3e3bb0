"""The node's Prometheus metrics: plain counters that are kept as requests end, everything else read at the scrape.

Labels are bounded: `model` is an id of GET /models, and what nobody knows counts as "other".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from helexa.core.discovery import Device, DeviceHealth
from helexa.core.lifecycle import ModelInfo, ModelStatus
from helexa.core.relay.contract import Exchange, Usage
from helexa.neuron.kv.store import Figures

OTHER: Final = "other"
LOAD_BUCKETS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
MB: Final = 1 << 20


class Metrics(Collector):
    """models, devices, health: what GET /models, /discovery and /health answer from. kv: None while prompt caches are
    not kept."""

    def __init__(
        self,
        *,
        models: Callable[[], Iterable[ModelInfo]],
        devices: Callable[[], Iterable[Device]],
        health: Callable[[], Iterable[DeviceHealth]],
        kv: Callable[[], Figures | None] = lambda: None,
    ) -> None:
        self._models = models
        self._devices = devices
        self._health = health
        self._kv = kv
        self._tokens: dict[str, list[int]] = {}  # model -> prompt, completion, cached
        self._loads: dict[str, _Histogram] = {}
        self._status: dict[str, str] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def count(self, model: str, exchange: Exchange) -> None:
        """A request ended, however it ended."""
        used = tokens_of(exchange)
        if used is None:
            return
        sums = self._tokens.get(model)
        if sums is None:
            sums = self._tokens[model] = [0, 0, 0]
        sums[0] += used.prompt_tokens
        sums[1] += used.completion_tokens
        sums[2] += used.cached_tokens

    def saw_model(self, info: dict[str, Any]) -> None:
        """A "model" event: a load that has just ended well is timed."""
        model, status = info["id"], info["status"]
        before = self._status.get(model)
        self._status[model] = status
        seconds = info.get("load_seconds")
        if status == ModelStatus.LOADED and before != status and before != ModelStatus.UNLOADING and seconds:
            self._loads.setdefault(model, _Histogram(LOAD_BUCKETS)).add(seconds)

    def render(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield self._device_memory()
        models = list(self._models())
        yield from self._model_states(models)
        for index, (name, what) in enumerate(
            (
                ("neuron_prompt_tokens", "Tokens of prompts, those found in the prompt cache included."),
                ("neuron_completion_tokens", "Tokens generated."),
                ("neuron_prompt_cached_tokens", "Tokens of prompts that the prompt cache spared."),
            )
        ):
            counter = CounterMetricFamily(name, what, labels=["model"])
            for model, sums in self._tokens.items():
                counter.add_metric([model], sums[index])
            yield counter
        loads = HistogramMetricFamily(
            "neuron_model_load_seconds", "From the wish to the model being ready, downloads apart.", labels=["model"]
        )
        for model, histogram in self._loads.items():
            loads.add_metric([model], buckets=histogram.cumulative(), sum_value=histogram.sum)
        yield loads
        if (kv := self._kv()) is not None:
            yield from _kv_families(kv)

    def _device_memory(self) -> Metric:
        gauge = GaugeMetricFamily("neuron_device_memory_bytes", "Memory of each device.", labels=["device", "kind"])
        totals = {device.index: device.vram_total_mb for device in self._devices()}
        for health in self._health():
            kinds = (
                ("used", health.vram_used_mb),
                ("free", health.vram_free_mb),
                ("total", totals.get(health.index)),
            )
            for kind, mb in kinds:
                if mb is not None:  # unknown is absent, never zero
                    gauge.add_metric([str(health.index), kind], mb * MB)
        return gauge

    def _model_states(self, models: list[ModelInfo]) -> Iterator[Metric]:
        status = GaugeMetricFamily(
            "neuron_model_status", "1 for the state that the model is in.", labels=["model", "status"]
        )
        active = GaugeMetricFamily("neuron_active_requests", "Requests that hold a slot.", labels=["model"])
        queued = GaugeMetricFamily("neuron_queued_requests", "Requests that wait for a slot.", labels=["model"])
        for info in models:
            for state in ModelStatus:
                status.add_metric([info.id, state.value], 1 if info.status == state else 0)
            if info.active_requests is not None:
                active.add_metric([info.id], info.active_requests)
            if info.queued_requests is not None:
                queued.add_metric([info.id], info.queued_requests)
        yield status
        yield active
        yield queued


def _kv_families(kv: Figures) -> Iterator[Metric]:
    yield GaugeMetricFamily("neuron_kv_store_bytes", "Prompt caches on this node's disk.", value=kv.size_bytes)
    yield GaugeMetricFamily("neuron_kv_store_states", "How many they are: one a conversation.", value=kv.states)
    yield CounterMetricFamily("neuron_kv_saved", "Prompt caches written.", value=kv.saved)
    yield CounterMetricFamily("neuron_kv_restored", "Prompt caches given back to a model.", value=kv.restored)
    yield CounterMetricFamily(
        "neuron_kv_dropped",
        "Prompt caches removed: too old, too many, continued by another, or no match.",
        value=kv.dropped,
    )


class _Histogram:
    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1  # `le`: a value on the bound belongs to it
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        seen, out = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            seen += count
            out.append((bound, float(seen)))
        return out


def tokens_of(exchange: Exchange) -> Usage | None:
    """What a request cost, from the best that is known: its usage, the engine's timings, or, for a client that left
    before either came, the reads that passed, each of which bore at least one token. None where nothing is known.
    """
    if exchange.usage is not None:
        return exchange.usage
    if exchange.timings:
        cached = int(exchange.timings.get("cache_n", 0))
        return Usage(
            prompt_tokens=int(exchange.timings.get("prompt_n", 0)) + cached,
            completion_tokens=int(exchange.timings.get("predicted_n", 0)),
            cached_tokens=cached,
        )
    if exchange.stream and exchange.t_first_token:
        return Usage(completion_tokens=exchange.reads)
    return None
