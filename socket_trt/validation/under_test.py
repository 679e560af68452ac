"""The engine under validation, on either runtime: its sessions with a budget that keeps everything, its operators alone."""

from __future__ import annotations

from typing import Any, Protocol

from polygraphy.backend.base import BaseRunner

from socket_trt.config import INT32_MAX, AttentionKind
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.progress import Progress
from socket_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from socket_trt.runtime.session import Session
from socket_trt.validation.runners import operator_runner
from socket_trt.validation.variants import EngineGraph

RUNNER_NAME = "engine"


class EngineUnderTest(Protocol):
    def open_dense(self) -> Session:
        """A session whose budget no sequence exceeds: its sparse path computes dense attention."""

    def operator(self, layer: int, **changes: Any) -> BaseRunner:
        """Polygraphy's runner of one layer's operator, with attributes changed."""


class OnnxRuntimeEngine:
    """The engine's graph on ONNX Runtime's CPU provider, with the function body it carries."""

    def __init__(self, engine: EngineDirectory) -> None:
        self._engine, self._graph = engine, EngineGraph(engine)

    def open_dense(self) -> Session:
        changed = None
        if self._engine.manifest.attention is not AttentionKind.dense:
            changed = self._graph.with_attributes(budget_tokens=INT32_MAX, min_length=0)
        return OnnxRuntimeSession(self._engine, graph=changed)

    def operator(self, layer: int, **changes: Any) -> BaseRunner:
        return operator_runner(self._graph.operator(layer, **changes), RUNNER_NAME)


class TensorRTEngine:
    """The engine's graph built by TensorRT, and plans of single operators with the same plugin.

    Polygraphy's own TensorRT runner gives every output memory of its own; the caches are one buffer in and out, and the
    weights are inputs, so sessions and operators run through this project's runners (of Polygraphy's interface).
    """

    def __init__(self, engine: EngineDirectory, progress: Progress) -> None:
        from socket_trt.engine.tensorrt import open_tensorrt

        self._engine, self._progress = engine, progress
        self._graph = EngineGraph(engine)
        self._tensorrt = open_tensorrt()
        self._dense: Any = None

    def open_dense(self) -> Session:
        from socket_trt.engine.compile import compile_variant
        from socket_trt.runtime.tensorrt_session import TensorRTSession

        manifest = self._engine.manifest
        if manifest.attention is AttentionKind.dense:
            return TensorRTSession(self._engine, progress=self._progress)
        if self._dense is None:
            changes = {"budget_tokens": INT32_MAX, "min_length": 0}
            self._dense = compile_variant(self._engine, self._tensorrt, self._progress, changes)
        return TensorRTSession(self._engine, compiled=self._dense, progress=self._progress)

    def operator(self, layer: int, **changes: Any) -> BaseRunner:
        from socket_trt.validation.tensorrt_operator import TensorRTOperatorRunner

        attributes = self._graph.attributes(layer).replace(**changes)
        return TensorRTOperatorRunner(self._tensorrt, self._engine.manifest, attributes, RUNNER_NAME)
