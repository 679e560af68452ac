"""Measures the steps of a session, whatever runs them."""

from __future__ import annotations

import time

import numpy as np

from socket_trt.config import AttentionKind
from socket_trt.engine.manifest import Manifest
from socket_trt.runtime.session import FloatArray, IntArray, Session, SessionLimits, StepBatch
from socket_trt.serving import metrics
from socket_trt.serving.metrics import Metrics


class MeteredSession(Session):
    """Passes steps on and counts them.

    `failures_in_a_row`: steps that raised since the last one that did not.
    """

    def __init__(self, session: Session, manifest: Manifest, sink: Metrics) -> None:
        self._session = session
        self._socket = manifest.socket
        self._dense = manifest.attention is AttentionKind.dense
        self._metrics = sink
        self.failures_in_a_row = 0

    @property
    def limits(self) -> SessionLimits:
        return self._session.limits

    def step(self, batch: StepBatch) -> FloatArray:
        totals = self._metrics.totals
        totals[metrics.STEPS] += 1
        began = time.perf_counter()
        try:
            logits = self._session.step(batch)
        except Exception:
            totals[metrics.FAILED_STEPS] += 1
            self.failures_in_a_row += 1
            raise
        self.failures_in_a_row = 0
        self._metrics.observe(metrics.STEP_SECONDS, time.perf_counter() - began)
        decodes = np.diff(batch.query_start) == 1
        lengths = batch.past_length[decodes].astype(np.int64) + 1
        totals[metrics.CONTEXT_TOKENS] += int(lengths.sum())
        totals[metrics.ATTENDED_TOKENS] += self._attended(lengths)
        return logits

    def close(self) -> None:
        self._session.close()

    def _attended(self, lengths: IntArray) -> int:
        """Tokens that decode queries at these lengths attend to, in a layer without a sliding window."""
        socket = self._socket
        if self._dense:
            return int(lengths.sum())
        kept = [socket.sink + socket.window + socket.budget(length) for length in lengths.tolist()]
        return int(np.where(lengths <= socket.min_length, lengths, np.minimum(lengths, kept)).sum())
