"""Polygraphy runners: an engine's session, transformers' own model, and the reference operator."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata

from socket_trt import names
from socket_trt.config import OperatorAttributes
from socket_trt.reference import socket_attention
from socket_trt.runtime.onnxruntime_session import session_options
from socket_trt.runtime.session import IntArray, Session, StepBatch

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

Arrays = OrderedDict[str, np.ndarray]


def feed_dict(batch: StepBatch) -> Arrays:
    return OrderedDict((name, getattr(batch, name)) for name in names.STEP_INPUTS)


class _StepRunner(BaseRunner):  # type: ignore[misc]
    """A runner fed with step batches in order, which keeps its own cache between them."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name in names.STEP_INPUTS:
            metadata.add(name, dtype=np.int32, shape=(None, None) if name == names.PAGE_TABLE else (None,))
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        begin = time.perf_counter()
        logits = self._step(StepBatch(**feed_dict))
        self.inference_time = time.perf_counter() - begin
        return OrderedDict({names.LOGITS: logits})

    def _step(self, batch: StepBatch) -> np.ndarray:
        raise NotImplementedError


class SessionRunner(_StepRunner):
    """Runs a `Session`, opened when the runner is activated."""

    def __init__(self, open_session: Callable[[], Session], name: str) -> None:
        super().__init__(name=name)
        self._open = open_session

    def activate_impl(self) -> None:
        self._session = self._open()

    def deactivate_impl(self) -> None:
        self._session.close()
        del self._session

    def _step(self, batch: StepBatch) -> np.ndarray:
        return self._session.step(batch)


class TransformersRunner(_StepRunner):
    """transformers' own model with its own attention and cache, one row at a time: it knows nothing of SOCKET."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__(name=name)
        self._model = model

    def activate_impl(self) -> None:
        self._caches: dict[int, DynamicCache] = {}

    def deactivate_impl(self) -> None:
        del self._caches

    def _step(self, batch: StepBatch) -> np.ndarray:
        from transformers import DynamicCache

        rows = []
        for row in range(len(batch.past_length)):
            first, last = batch.query_start[row : row + 2]
            cache = self._caches.setdefault(row, DynamicCache(config=self._model.config))
            ids: IntArray = batch.input_ids[first:last]
            with torch.no_grad():
                result = self._model(input_ids=torch.from_numpy(ids)[None].long(), past_key_values=cache)
            rows.append(result.logits[0, batch.logits_indices[row] - first].float().numpy())
        return np.stack(rows)


def operator_runner(model: bytes, name: str | None = None) -> OnnxrtRunner:
    """Runs a serialised model of one operator on ONNX Runtime's CPU provider."""
    return OnnxrtRunner(
        lambda: ort.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"]), name=name
    )


class ReferenceOperatorRunner(BaseRunner):  # type: ignore[misc]
    """The PyTorch reference of one operator; `example` shows its inputs' dtypes and ranks."""

    def __init__(self, attributes: OperatorAttributes, example: dict[str, np.ndarray], name: str) -> None:
        super().__init__(name=name)
        self._attributes = attributes
        self._example = example

    def activate_impl(self) -> None:
        """Nothing to open."""

    def deactivate_impl(self) -> None:
        """Nothing to close."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name in names.OPERATOR_INPUTS:
            array = self._example[name]
            metadata.add(name, dtype=array.dtype, shape=(None,) * array.ndim)
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> Arrays:
        inputs: dict[str, Any] = {name: torch.from_numpy(np.asarray(feed_dict[name])) for name in names.OPERATOR_INPUTS}
        begin = time.perf_counter()
        outputs = socket_attention(**inputs, attributes=self._attributes)
        self.inference_time = time.perf_counter() - begin
        return OrderedDict(
            (name, tensor.contiguous().numpy()) for name, tensor in zip(names.OPERATOR_OUTPUTS, outputs, strict=True)
        )
