"""Initializers of an exported graph become external tensors inside the checkpoint's own safetensors files."""

from __future__ import annotations

import math

import onnx_ir as ir

from socket_trt.errors import CheckpointError
from socket_trt.weights import TensorLocation

_TYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F64": ir.DataType.DOUBLE,
}

# A checkpoint with tied embeddings may leave out either of the two names.
_TIED = {
    "lm_head.weight": "model.embed_tokens.weight",
    "model.embed_tokens.weight": "lm_head.weight",
}


def attach_weights(model: ir.Model, tensors: dict[str, TensorLocation], tied: bool) -> dict[str, TensorLocation]:
    """Point every weight of the graph at its bytes; weights of another dtype than the graph's get a Cast behind them.

    `tensors` is the checkpoint's index, `tied` whether the embedding serves as lm_head.  Returns the locations by
    initializer.  Raises CheckpointError where the checkpoint lacks a weight or holds it in another shape or form.
    """
    used = {}
    for name, value in list(model.graph.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor) or not _is_weight(value):
            continue
        source = name if name in tensors else _TIED.get(name, name) if tied else name
        if source not in tensors:
            raise CheckpointError(f"the checkpoint lacks {name}; it belongs to another model, or is incomplete")
        location = tensors[source]
        shape = [int(dim) for dim in value.shape]
        if list(location.shape) != shape:
            raise CheckpointError(
                f"{location.file}: {source} is {list(location.shape)}, the model's configuration wants {shape}"
            )
        if location.dtype not in _TYPES:
            raise CheckpointError(
                f"{location.file}: {source} is stored as {location.dtype}; give a float16, bfloat16 or float32 checkpoint"
            )
        stored = _TYPES[location.dtype]
        if stored != value.dtype:
            _cast_behind(model.graph, value, stored)
        value.const_value = ir.ExternalTensor(
            location=location.file,
            offset=location.offset,
            length=location.length,
            dtype=stored,
            shape=ir.Shape(shape),
            name=name,
        )
        used[name] = location
    return used


def _is_weight(value: ir.Value) -> bool:
    """Parameters are named as in the checkpoint; constants of the graph are not."""
    return bool(value.name) and value.name.endswith((".weight", ".bias")) and math.prod(map(int, value.shape)) > 0


def _cast_behind(graph: ir.Graph, value: ir.Value, stored: ir.DataType) -> None:
    """Let `value` be of type `stored` and its users read it through one Cast to the type it had."""
    cast = ir.node("Cast", [value], {"to": value.dtype}, name=f"{value.name}/cast")
    cast.outputs[0].name = f"{value.name}/cast"
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(value.dtype)
    for user, index in [use for use in value.uses() if use[0] is not cast]:
        user.replace_input_with(index, cast.outputs[0])
    value.type = ir.TensorType(stored)
    graph.insert_before(graph[0], cast)
