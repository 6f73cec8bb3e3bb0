"""What the gateway counts, and its rendering for Prometheus. Counting only: no policy reads a figure from here.

Labels are bounded: `model` is an id the fleet knows (any other name counts as `other`), `node` a configured name, or
empty where a request never reached one, `endpoint` a path of the API.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from helexa.core.relay.contract import Exchange
from helexa.core.request_log import outcome, tokens_per_second

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

OTHER: Final = "other"

# LLM serving reaches from a cached first token to an answer of ten minutes.
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS_PER_SECOND: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 200.0, 300.0, 500.0, 1000.0)


class Histogram:
    """Counts per bucket, not cumulative until they are rendered; the last one is what lies above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        rows: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            rows.append((bound, running))
        return rows

    @property
    def is_empty(self) -> bool:
        return not any(self.counts)


class Series:
    """Everything counted for one model on one node; looked up once per request."""

    __slots__ = ("cached", "completion", "duration", "first_token", "inflight", "prompt", "requests", "speed")

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}  # (endpoint, status)
        self.duration = Histogram(SECONDS)
        self.first_token = Histogram(SECONDS)
        self.speed = Histogram(TOKENS_PER_SECOND)
        self.prompt = 0
        self.completion = 0
        self.cached = 0
        self.inflight = 0


class Metrics:
    """The counters of one gateway. All calls come from its loop."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str], Series] = {}
        self._queue_wait: dict[str, Histogram] = {}
        self._cold_starts: dict[str, int] = {}
        self._load_seconds: dict[tuple[str, str], Histogram] = {}
        self._upstream_errors: dict[tuple[str, str], int] = {}
        self._choices: dict[tuple[str, str], int] = {}

    def series(self, model: str, node: str) -> Series:
        key = (model, node)
        found = self._series.get(key)
        if found is None:
            found = self._series[key] = Series()
        return found

    def record(self, exchange: Exchange, series: Series) -> None:
        """HOT, once per exchange, at its end: dictionary look-ups and integer additions only."""
        key = (exchange.endpoint.path, outcome(exchange))
        requests = series.requests
        requests[key] = requests.get(key, 0) + 1
        series.duration.observe(exchange.t_end - exchange.t_start)
        if exchange.t_first_token:
            series.first_token.observe(exchange.t_first_token - exchange.t_start)
        usage = exchange.usage
        if usage is not None:
            series.prompt += usage.prompt_tokens
            series.completion += usage.completion_tokens
            series.cached += usage.cached_tokens
            speed = tokens_per_second(exchange)
            if speed is not None:
                series.speed.observe(speed)
        elif exchange.stream and exchange.endpoint.generates and exchange.t_first_token:
            # The client left before usage came: what was seen passing is the least that was generated.
            series.completion += exchange.reads

    def waited(self, model: str, seconds: float) -> None:
        """A request waited for a load or in a queue of the gateway, and was then sent on."""
        self._queue_wait.setdefault(model, Histogram(SECONDS)).observe(seconds)

    def cold_start(self, model: str) -> None:
        """Requests found the model on no node: one for each load, however many of them wait."""
        self._cold_starts[model] = self._cold_starts.get(model, 0) + 1

    def loaded(self, model: str, node: str, seconds: float) -> None:
        self._load_seconds.setdefault((model, node), Histogram(SECONDS)).observe(seconds)

    def upstream_error(self, node: str, kind: str) -> None:
        key = (node, kind)
        self._upstream_errors[key] = self._upstream_errors.get(key, 0) + 1

    def routed(self, model: str, by: str) -> None:
        """HOT. A request had several replicas to go to. by: router.By."""
        key = (model, by)
        self._choices[key] = self._choices.get(key, 0) + 1

    def render(self, node_up: Mapping[str, bool]) -> bytes:
        """The exposition text. Cold: some milliseconds with many models."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(self, node_up))
        return generate_latest(registry)

    def families(self, node_up: Mapping[str, bool]) -> Iterator[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        pair = ["model", "node"]
        requests = CounterMetricFamily(
            "cortex_requests",
            "Requests, by what the client got; 499 is a client that left, a stream that ended in an error event counts "
            "as that error.",
            labels=["model", "node", "endpoint", "status"],
        )
        duration = HistogramMetricFamily(
            "cortex_request_duration_seconds", "From the request's head to the last byte of its answer.", labels=pair
        )
        first = HistogramMetricFamily(
            "cortex_time_to_first_token_seconds",
            "From the request's head to the first generated token (text, reasoning or tool call) of a stream.",
            labels=pair,
        )
        speed = HistogramMetricFamily(
            "cortex_output_tokens_per_second", "Decode speed of a request, the engine's own where it says.", labels=pair
        )
        tokens = CounterMetricFamily(
            "cortex_tokens", "Tokens; cached ones are prompt tokens too.", labels=[*pair, "direction"]
        )
        inflight = GaugeMetricFamily("cortex_inflight_requests", "Requests at a node now.", labels=pair)
        for (model, node), s in self._series.items():
            labels = [model, node]
            for (endpoint, status), count in s.requests.items():
                requests.add_metric([model, node, endpoint, str(status)], count)
            for family, histogram in ((duration, s.duration), (first, s.first_token), (speed, s.speed)):
                if not histogram.is_empty:
                    family.add_metric(labels, histogram.cumulative(), histogram.total)
            for direction, count in (("prompt", s.prompt), ("completion", s.completion), ("cached", s.cached)):
                tokens.add_metric([model, node, direction], count)
            if node:
                inflight.add_metric(labels, s.inflight)
        yield from (requests, duration, first, speed, tokens, inflight)

        wait = HistogramMetricFamily(
            "cortex_queue_wait_seconds",
            "How long requests that had to wait for a load waited; those served at once are not in it.",
            labels=["model"],
        )
        for model, histogram in self._queue_wait.items():
            wait.add_metric([model], histogram.cumulative(), histogram.total)
        yield wait

        cold = CounterMetricFamily("cortex_cold_starts", "Loads that requests had to wait for.", labels=["model"])
        for model, count in self._cold_starts.items():
            cold.add_metric([model], count)
        yield cold

        load = HistogramMetricFamily("cortex_model_load_seconds", "Loads, as the nodes time them.", labels=pair)
        for (model, node), histogram in self._load_seconds.items():
            load.add_metric([model, node], histogram.cumulative(), histogram.total)
        yield load

        choices = CounterMetricFamily(
            "cortex_routing_choices",
            "Prompts that had several replicas to go to, by why the chosen one: prefix (it holds most of the prompt), "
            "session (it had the session last), moved (another holds more, and has too much to do), new (none knows "
            "it).",
            labels=["model", "by"],
        )
        for (model, by), count in self._choices.items():
            choices.add_metric([model, by], count)
        yield choices

        errors = CounterMetricFamily(
            "cortex_upstream_errors",
            "Attempts at a node that failed: connect, stall, stream (broke off after its first byte), or the status "
            "it refused with.",
            labels=["node", "kind"],
        )
        for (node, kind), count in self._upstream_errors.items():
            errors.add_metric([node, kind], count)
        yield errors

        up = GaugeMetricFamily("cortex_node_up", "1 while the node answers.", labels=["node"])
        for node, alive in node_up.items():
            up.add_metric([node], 1 if alive else 0)
        yield up


class _Collector:
    """prometheus_client's custom collector: the families of one scrape."""

    def __init__(self, metrics: Metrics, node_up: Mapping[str, bool]) -> None:
        self._metrics = metrics
        self._node_up = node_up

    def collect(self) -> Iterator[Metric]:
        return self._metrics.families(self._node_up)
