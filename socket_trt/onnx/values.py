"""What passes over a graph ask and tell of its values."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def constant_integers(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant, in one list; None for what is no constant."""
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if constant is None else [int(x) for x in constant.numpy().reshape(-1)]


def constant_number(value: ir.Value | None) -> float | None:
    """The number of a constant that holds one; None for anything else."""
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(constant.numpy().item()) if constant is not None and constant.size == 1 else None


def describe(node: ir.Node, like: ir.Value, shape: Sequence[object] | None) -> None:
    """Name the output after its node, and give it the type of `like`."""
    output = node.outputs[0]
    output.name, output.type, output.shape = node.name, like.type, None if shape is None else ir.Shape(shape)


def part_of(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(x, first, last) where `value` is columns first to last, exclusive, of the last axis of x: a slice, or of a split."""
    node = value.producer() if value is not None else None
    if node is None or not node.inputs or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    source, last_axis = node.inputs[0], len(node.inputs[0].shape) - 1
    if node.op_type == "Split" and node.attributes.get_int("axis", 0) in (-1, last_axis):
        sizes = [output.shape[-1] if output.shape is not None else None for output in node.outputs]
        if not all(isinstance(size, int) for size in sizes):
            return None
        lengths = [int(size) for size in sizes if isinstance(size, int)]
        index = next(i for i, output in enumerate(node.outputs) if output is value)
        return source, sum(lengths[:index]), sum(lengths[: index + 1])
    if node.op_type != "Slice":
        return None
    numbers = [constant_integers(one) for one in node.inputs[1:]]
    if len(numbers) < 3 or any(one is None or len(one) != 1 for one in numbers):
        return None
    first, last, axis, step = [*(one[0] for one in numbers if one), 1][:4]
    size = source.shape[-1] if source.shape is not None else None
    if step != 1 or axis not in (-1, last_axis) or not isinstance(size, int):
        return None
    return source, first, min(last, size)


def remove_unused(graph: ir.Graph, node: ir.Node) -> None:
    """Remove `node` if it is there and nothing reads it, and what then has no reader before it."""
    if node.graph is not graph or any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    inputs = [value.producer() for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for producer in inputs:
        if producer is not None:
            remove_unused(graph, producer)
