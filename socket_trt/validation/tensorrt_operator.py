"""One `SocketAttention` operator as a TensorRT plan, behind Polygraphy's runner interface."""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from socket_trt import names
from socket_trt.config import OperatorAttributes, code_bits
from socket_trt.engine.manifest import Manifest
from socket_trt.engine.plan import build_network_plan
from socket_trt.engine.tensorrt import TensorRT
from socket_trt.errors import EngineError
from socket_trt.onnx.network import network_graph
from socket_trt.onnx.single import operator_model
from socket_trt.runtime.cuda import Device, DeviceBuffer, PinnedBuffer, Stream

_CACHES = names.OPERATOR_INPUTS[3:7]


@functools.lru_cache(maxsize=16)
def _plan(tensorrt: TensorRT, attributes: OperatorAttributes, shape: tuple[int, int, int, int, int]) -> Any:
    """The engine of one operator; `shape` is (Hq, Hkv, D, L, R).  Layers with the same attributes share it."""
    query_heads, kv_heads, size, tables, rank = shape
    fixed = {
        "query_heads": query_heads, "kv_heads": kv_heads, "head_size": size, "page_size": attributes.page_size,
        "tables": tables, "rank": rank, "words": attributes.page_size * code_bits(rank) // 32,
    }  # fmt: skip
    model = operator_model(attributes, 17, half=True)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in fixed:
                dim.dim_value = fixed[dim.dim_param]
    graph = network_graph(ir.from_proto(model))
    ranges = {
        "tokens": (1, 64, 4096), "sequences": (1, 2, 64), "boundaries": (2, 3, 65), "pages": (2, 64, 4096),
        "pages_per_sequence": (1, 16, 4096),
    }  # fmt: skip
    plan = build_network_plan(tensorrt.module, tensorrt.logger, graph, [_shapes(model, ranges)])
    runtime = tensorrt.module.Runtime(tensorrt.logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"TensorRT cannot load the operator's plan: {tensorrt.logger.explain()}")
    return engine


def _shapes(model: onnx.ModelProto, ranges: dict[str, tuple[int, int, int]]) -> dict[str, Any]:
    """Least, best and greatest shape of every input with a size that varies."""
    shapes = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if any(dim.dim_param in ranges for dim in dims):
            shapes[value.name] = tuple(
                tuple(ranges[d.dim_param][i] if d.dim_param in ranges else d.dim_value for d in dims) for i in range(3)
            )
    return shapes


class TensorRTOperatorRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy has no types
    """Runs one operator on the GPU; the caches are one buffer, in and out, as in an engine."""

    def __init__(self, tensorrt: TensorRT, manifest: Manifest, attributes: OperatorAttributes, name: str) -> None:
        super().__init__(name=name)
        model, socket = manifest.model, manifest.socket
        self._tensorrt, self._attributes = tensorrt, attributes
        self._shape = (model.query_heads, model.kv_heads, model.head_size, socket.tables, socket.planes)

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for value in operator_model(self._attributes, 17, half=True).graph.input:
            kind = np.int32 if value.name in names.INTEGER_INPUTS else np.float16
            metadata.add(value.name, dtype=kind, shape=(None,) * len(value.type.tensor_type.shape.dim))
        return metadata

    def activate_impl(self) -> None:
        self._device = Device()
        self._stream = Stream()
        self._context = _plan(self._tensorrt, self._attributes, self._shape).create_execution_context()
        if self._context is None:
            raise EngineError(f"TensorRT cannot create an execution context: {self._tensorrt.logger.explain()}")

    def deactivate_impl(self) -> None:
        del self._context
        self._stream.free()

    def infer_impl(self, feed_dict: dict[str, npt.NDArray[Any]]) -> OrderedDict[str, npt.NDArray[Any]]:
        arrays = {name: np.ascontiguousarray(feed_dict[name]) for name in names.OPERATOR_INPUTS}
        results = {name: arrays[name.removesuffix("_out")] for name in names.OPERATOR_OUTPUTS[1:]}
        results["output"] = arrays["query"]  # of its shape
        buffers = {name: DeviceBuffer(array.nbytes) for name, array in arrays.items()}
        buffers["output"] = DeviceBuffer(arrays["query"].nbytes)
        buffers |= {f"{name}_out": buffers[name] for name in _CACHES}
        begin = time.perf_counter()
        try:
            for name, array in arrays.items():
                self._move(array, buffers[name].address, to_device=True)
                if name != "planes":  # the one input of fixed shape
                    self._check(self._context.set_input_shape(name, array.shape))
            for name, buffer in buffers.items():
                self._check(self._context.set_tensor_address(name, buffer.address))
            self._check(self._context.execute_async_v3(self._stream.handle))
            self._stream.synchronize()
            outputs = OrderedDict(
                (name, self._move(results[name], buffers[name].address, to_device=False))
                for name in names.OPERATOR_OUTPUTS
            )
        finally:
            for name in (*names.OPERATOR_INPUTS, "output"):
                buffers[name].free()
        self.inference_time = time.perf_counter() - begin
        return outputs

    def _move(self, array: npt.NDArray[Any], address: int, to_device: bool) -> npt.NDArray[Any]:
        """Copy an array to the GPU, or one of its shape and dtype from there."""
        memory = PinnedBuffer(array.nbytes)
        try:
            if to_device:
                memory.bytes[: array.nbytes] = array.reshape(-1).view(np.uint8)
                self._stream.to_device(address, memory.address, array.nbytes)
            else:
                self._stream.to_host(memory.address, address, array.nbytes)
            self._stream.synchronize()
            moved: npt.NDArray[Any] = memory.bytes[: array.nbytes].copy().view(array.dtype).reshape(array.shape)
            return moved
        finally:
            memory.free()

    def _check(self, succeeded: bool) -> None:
        if not succeeded:
            raise EngineError(f"TensorRT {self._tensorrt.version}: {self._tensorrt.logger.explain()}")
