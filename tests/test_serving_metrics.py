from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from socket_trt.config import AttentionKind, SocketConfig
from socket_trt.engine.manifest import Manifest
from socket_trt.runtime.session import FloatArray, IntArray, Session, SessionLimits, StepBatch
from socket_trt.serving import metrics, protocol
from socket_trt.serving.meter import MeteredSession
from socket_trt.serving.metrics import SPECS, Metrics
from tests.serving import LIMITS, MANIFEST, Recorder


class Still(Session):
    """Answers zeros, or raises."""

    limits: SessionLimits = LIMITS
    fails = closed = False

    def step(self, batch: StepBatch) -> FloatArray:
        if self.fails:
            raise RuntimeError("failed")
        return np.zeros((len(batch.past_length), LIMITS.vocabulary_size), np.float32)

    def close(self) -> None:
        self.closed = True


def batch(past: list[int], counts: list[int]) -> StepBatch:
    def ints(values: list[int]) -> IntArray:
        return np.array(values, np.int32)

    starts = np.cumsum([0, *counts]).astype(np.int32)
    tokens = ints([0] * sum(counts))
    table = np.ones((len(past), LIMITS.pages_per_sequence), np.int32)
    return StepBatch(tokens, tokens, starts[1:] - 1, table, ints(past), starts)


def manifest(attention: AttentionKind = AttentionKind.socket, **socket: int) -> Manifest:
    values = {"sink": 8, "window": 8, "budget_tokens": 4, "budget_permille": 100, "page_size": 16, "min_length": 0}
    return MANIFEST.model_copy(update={"attention": attention, "socket": SocketConfig(**values | socket)})


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        # At lengths 10, 21, 101 and 1001: whole; the floor of 4; ceil(10.1) = 11; 101.
        (manifest(), 10 + 20 + 16 + 11 + 16 + 101),
        (manifest(min_length=101), 10 + 21 + 101 + 16 + 101),
        (manifest(AttentionKind.dense), 10 + 21 + 101 + 1001),
    ],
)
def test_what_decode_queries_attend_to(own: Manifest, kept: int) -> None:
    sink = Metrics(Recorder())
    session = MeteredSession(Still(), own, sink)
    # Prefill chunks between them are attended densely and not counted.
    session.step(batch([9, 0, 20, 100, 64, 1000], [1, 30, 1, 1, 2, 1]))
    assert sink.totals[metrics.CONTEXT_TOKENS] == 10 + 21 + 101 + 1001
    assert sink.totals[metrics.ATTENDED_TOKENS] == kept


def test_steps_that_fail_are_counted_until_one_does_not() -> None:
    inner, recorder = Still(), Recorder()
    sink = Metrics(recorder)
    session = MeteredSession(inner, manifest(), sink)
    inner.fails = True
    for failures in (1, 2):
        with pytest.raises(RuntimeError, match="failed"):
            session.step(batch([1], [1]))
        assert session.failures_in_a_row == failures
    inner.fails = False
    session.step(batch([1], [1]))
    assert session.failures_in_a_row == 0
    sink.publish()
    assert (recorder[metrics.STEPS].total, recorder[metrics.FAILED_STEPS].total) == (3, 2)
    assert len(recorder[metrics.STEP_SECONDS].observations) == 1
    assert session.limits is LIMITS
    session.close()
    assert inner.closed


def test_publishing_shows_what_is_new() -> None:
    recorder = Recorder()
    sink = Metrics(recorder)
    sink.publish()
    assert recorder[metrics.RECEIVED].total == 0
    assert recorder[metrics.KEPT_FRACTION].level is None  # no decode query yet
    sink.totals[metrics.RECEIVED] = 3
    sink.outcomes["finished"] = 2
    sink.levels[metrics.RUNNING] = 1
    sink.totals[metrics.CONTEXT_TOKENS], sink.totals[metrics.ATTENDED_TOKENS] = 100, 10
    sink.observe(metrics.QUEUE_SECONDS, 0.5)
    sink.publish()
    sink.publish()
    assert recorder[metrics.RECEIVED].total == 3
    assert recorder[metrics.ENDED, "finished"].total == 2
    assert recorder[metrics.ENDED, "failed"].total == 0
    assert recorder[metrics.RUNNING].level == 1
    assert recorder[metrics.QUEUE_SECONDS].observations == [0.5]
    assert recorder[metrics.KEPT_FRACTION].level == 0.1
    sink.totals[metrics.CONTEXT_TOKENS], sink.totals[metrics.ATTENDED_TOKENS] = 200, 60
    sink.publish()
    assert recorder[metrics.KEPT_FRACTION].level == 0.5  # of the second hundred


def test_every_metric_is_exported_by_a_name_of_its_own() -> None:
    recorder = Recorder()
    Metrics(recorder)
    assert {spec for spec, _ in recorder.recorded} == set(SPECS)
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)
    for spec in SPECS:
        assert spec.name.startswith("socket_trt_")
        assert spec.name.endswith("_total") == (spec.kind == "counter")
        assert spec.name.endswith("_seconds") == (spec.kind == "histogram")


def test_the_documentation_names_every_metric_and_tensor() -> None:
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    names = [spec.name.removeprefix("socket_trt_") for spec in SPECS]
    names += [spec.name for spec in (*protocol.INPUTS, *protocol.OUTPUTS)]
    assert [name for name in names if f"`{name}" not in text] == []
