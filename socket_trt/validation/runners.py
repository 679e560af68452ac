"""Polygraphy runners: a session, an operator on ONNX Runtime, and answers that are known."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import onnxruntime as ort
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata

from socket_trt import names
from socket_trt.runtime.onnxruntime_session import session_options
from socket_trt.runtime.session import Session, StepBatch

Arrays = OrderedDict[str, np.ndarray]


def feed_dict(batch: StepBatch) -> Arrays:
    return OrderedDict((name, getattr(batch, name)) for name in names.STEP_INPUTS)


def metadata_of(arrays: Mapping[str, np.ndarray]) -> TensorMetadata:
    """Polygraphy's description of inputs like `arrays`, of any shape of their rank."""
    metadata = TensorMetadata()
    for name, array in arrays.items():
        metadata.add(name, dtype=array.dtype, shape=(None,) * array.ndim)
    return metadata


class SessionRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy has no types
    """Runs a `Session`, opened when the runner is activated, on step batches in order: it keeps its own cache."""

    def __init__(self, open_session: Callable[[], Session], name: str, example: StepBatch) -> None:
        super().__init__(name=name)
        self._open = open_session
        self._metadata = metadata_of(feed_dict(example))

    def activate_impl(self) -> None:
        self._session = self._open()

    def deactivate_impl(self) -> None:
        self._session.close()
        del self._session

    def get_input_metadata_impl(self) -> TensorMetadata:
        return self._metadata

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        begin = time.perf_counter()
        logits = self._session.step(StepBatch(**feed_dict))
        self.inference_time = time.perf_counter() - begin
        return OrderedDict({names.LOGITS: logits.copy()})


class KnownAnswers(BaseRunner):  # type: ignore[misc]  # Polygraphy has no types
    """Answers the inputs it is given, in order, with what is known of them."""

    def __init__(
        self, answers: Iterable[Mapping[str, np.ndarray]], name: str, example: Mapping[str, np.ndarray]
    ) -> None:
        super().__init__(name=name)
        self._answers = answers
        self._metadata = metadata_of(example)

    def activate_impl(self) -> None:
        self._next: Iterator[Mapping[str, np.ndarray]] = iter(self._answers)

    def deactivate_impl(self) -> None:
        del self._next

    def get_input_metadata_impl(self) -> TensorMetadata:
        return self._metadata

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        begin = time.perf_counter()
        answer = OrderedDict(next(self._next))
        self.inference_time = time.perf_counter() - begin
        return answer


def operator_runner(model: bytes, name: str | None = None) -> OnnxrtRunner:
    """Runs a serialised model of one operator on ONNX Runtime's CPU provider."""
    return OnnxrtRunner(
        lambda: ort.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"]), name=name
    )
