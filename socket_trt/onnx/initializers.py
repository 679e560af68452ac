"""Constants of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of the graph."""
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def add_integers(graph: ir.Graph, name: str, integers: Sequence[int]) -> ir.Value:
    """A new initializer that holds an int64 vector."""
    return add_initializer(graph, name, ir.tensor(integers, dtype=ir.DataType.INT64, name=name))
