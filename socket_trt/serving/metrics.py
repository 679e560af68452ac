"""What is measured while serving: values in Python, published now and then to wherever they can be seen."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

# How a request ended; every request that arrived ends in exactly one of these.
OUTCOMES = ("finished", "cancelled", "refused", "timed_out", "failed")


@dataclasses.dataclass(frozen=True)
class MetricSpec:
    """A metric as Prometheus knows it; histograms are in seconds."""

    name: str
    kind: Kind
    description: str


SPECS: list[MetricSpec] = []


def _spec(name: str, kind: Kind, description: str) -> MetricSpec:
    SPECS.append(MetricSpec(f"socket_trt_{name}", kind, description))
    return SPECS[-1]


RECEIVED = _spec("requests_received_total", "counter", "Requests that arrived")
ENDED = _spec("requests_total", "counter", f"Requests that ended, by outcome: {', '.join(OUTCOMES)}")
PROMPT_TOKENS = _spec("prompt_tokens_total", "counter", "Tokens of the prompts of requests that were accepted")
GENERATED_TOKENS = _spec("generated_tokens_total", "counter", "Tokens generated")
PREFILLED_TOKENS = _spec("prefilled_tokens_total", "counter", "Prompt tokens computed, again after a preemption")
REPLAYED_TOKENS = _spec("replayed_tokens_total", "counter", "Generated tokens computed again after a preemption")
PREEMPTIONS = _spec("preemptions_total", "counter", "Requests that gave their pages to an earlier one")
STEPS = _spec("steps_total", "counter", "Steps of the engine")
FAILED_STEPS = _spec("failed_steps_total", "counter", "Steps that raised")
CONTEXT_TOKENS = _spec("context_tokens_total", "counter", "Tokens in the cache of each decode query")
ATTENDED_TOKENS = _spec("attended_tokens_total", "counter", "Of those, tokens that the query attended to at most")
RUNNING = _spec("running_requests", "gauge", "Requests that hold pages of the cache")
WAITING = _spec("waiting_requests", "gauge", "Requests that wait for pages")
PAGES_IN_USE = _spec("pages_in_use", "gauge", "Pages of the cache that hold a request")
PAGES = _spec("pages", "gauge", "Pages of the cache")
KEPT_FRACTION = _spec(
    "kept_fraction", "gauge", "Attended to context tokens of the decode queries since the last update"
)
QUEUE_SECONDS = _spec("queue_seconds", "histogram", "From a request's arrival to its pages")
FIRST_TOKEN_SECONDS = _spec("time_to_first_token_seconds", "histogram", "From a request's arrival to its first token")
OUTPUT_TOKEN_SECONDS = _spec(
    "time_per_output_token_seconds", "histogram", "Mean time between the tokens of a request that finished"
)
REQUEST_SECONDS = _spec("request_seconds", "histogram", "From a request's arrival to its end, if it finished")
STEP_SECONDS = _spec("step_seconds", "histogram", "Duration of a step")


class Series(Protocol):
    """One metric under one set of labels, as Triton's `Metric` is."""

    def increment(self, value: float) -> None: ...

    def set(self, value: float) -> None: ...

    def observe(self, value: float) -> None: ...


class Exporter(Protocol):
    def series(self, spec: MetricSpec, labels: Mapping[str, str], buckets: Sequence[float]) -> Series:
        """A series that is visible from now on; `buckets`: upper bounds, rising, of a histogram."""

    def close(self) -> None:
        """Take all series away; nobody refers to them any more."""


class Metrics:
    """Counts where it costs nothing, and publishes from one thread.

    `totals` and `levels` are written by the serving thread, observations come from any.
    """

    def __init__(self, exporter: Exporter) -> None:
        self.totals = {spec: 0 for spec in SPECS if spec.kind == "counter" and spec != ENDED}
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.levels = {spec: 0 for spec in SPECS if spec.kind == "gauge" and spec != KEPT_FRACTION}
        self._exporter = exporter
        self._observations: deque[tuple[MetricSpec, float]] = deque()
        self._published: dict[Series, int] = {}
        self._series = {
            spec: exporter.series(spec, {}, _SECONDS if spec.kind == "histogram" else ())
            for spec in SPECS
            if spec != ENDED
        }
        self._outcome_series = {outcome: exporter.series(ENDED, {"outcome": outcome}, ()) for outcome in OUTCOMES}
        self._kept_since = (0, 0)

    def observe(self, spec: MetricSpec, seconds: float) -> None:
        self._observations.append((spec, seconds))

    def publish(self) -> None:
        """Show everything that was counted so far."""
        for spec, total in self.totals.items():
            self._add_up(self._series[spec], total)
        for outcome, total in self.outcomes.items():
            self._add_up(self._outcome_series[outcome], total)
        for spec, level in self.levels.items():
            self._series[spec].set(level)
        attended, context = self.totals[ATTENDED_TOKENS], self.totals[CONTEXT_TOKENS]
        if context > self._kept_since[1]:
            kept = (attended - self._kept_since[0]) / (context - self._kept_since[1])
            self._series[KEPT_FRACTION].set(kept)
            self._kept_since = (attended, context)
        for _ in range(len(self._observations)):
            spec, seconds = self._observations.popleft()
            self._series[spec].observe(seconds)

    def close(self) -> None:
        """Take the metrics away."""
        self._published.clear()
        self._series.clear()
        self._outcome_series.clear()
        self._exporter.close()

    def _add_up(self, series: Series, total: int) -> None:
        before = self._published.get(series, 0)
        if total > before:
            series.increment(total - before)
            self._published[series] = total
