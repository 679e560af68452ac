"""Small matrix products of the same activations as one: above all the projections to queries, keys and values.

A step of few tokens reads every weight once and does little else, and a product with a small weight is over before the
memory is busy.  The rows of a joint weight are its parts' rows, one part after another: a joint input needs no copy of
them, only that its parts lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import onnx_ir as ir

_SEPARATOR = "+"  # in no name that PyTorch gives a parameter
# A group of products is joined where one of its weights is smaller than so many bytes of float16.  Larger ones are read
# at full speed as they are, and what comes out of them would be more to split.
SMALL_BYTES = 32 << 20


def parts_of(name: str) -> tuple[str, ...]:
    """Names of the weights that an input of a network holds: several for a joint one."""
    return tuple(name.split(_SEPARATOR))


def join_products(graph: ir.Graph, weights: Sequence[ir.Value], alone: Collection[ir.Value]) -> list[ir.Value]:
    """Rewrite the graph in place; returns its weights, joint ones at the end in place of their parts.

    weights  inputs of the graph
    alone    of them, those that share their bytes with no other: a weight has one place in memory

    A product is joined where its right operand is a weight, transposed, that nothing else uses.
    """
    groups: dict[tuple[ir.Value, object], list[ir.Node]] = {}
    for node in graph:
        weight = _weight_of(node)
        if weight is not None and weight in alone:
            assert node.inputs[0] is not None
            groups.setdefault((node.inputs[0], weight.dtype), []).append(node)
    parts: set[ir.Value] = set()
    joint = []
    for products in groups.values():
        own = [weight for product in products if (weight := _weight_of(product)) is not None]
        if len(products) > 1 and min(2 * math.prod(_sizes(weight)) for weight in own) < SMALL_BYTES:
            joint.append(_join(graph, products, own))
            parts.update(own)
    return [*(weight for weight in weights if weight not in parts), *joint]


def _weight_of(node: ir.Node) -> ir.Value | None:
    """The matrix W of a product x W^T, where nothing else uses W."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose" or len(node.inputs[1].uses()) > 1:
        return None
    weight = transpose.inputs[0]
    if weight is None or len(weight.uses()) > 1 or weight.shape is None or len(weight.shape) != 2:
        return None
    return weight


def _sizes(weight: ir.Value) -> tuple[int, int]:
    assert weight.shape is not None
    rows, columns = weight.shape
    return int(rows), int(columns)  # weights have no symbolic sizes


def _join(graph: ir.Graph, products: list[ir.Node], weights: list[ir.Value]) -> ir.Value:
    """Put one product and a split in the place of `products`; returns the joint weight, an input."""
    first, rows = products[0], [_sizes(weight)[0] for weight in weights]
    weight = ir.Value(
        name=_SEPARATOR.join(str(part.name) for part in weights),
        type=weights[0].type,
        shape=ir.Shape([sum(rows), _sizes(weights[0])[1]]),
    )
    transpose = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{first.name}/joint_weight")
    _describe(transpose.outputs[0], weight, [_sizes(weights[0])[1], sum(rows)], transpose.name)
    product = ir.node("MatMul", [first.inputs[0], transpose.outputs[0]], name=f"{first.name}/joint")
    before = first.outputs[0].shape
    assert before is not None
    _describe(product.outputs[0], first.outputs[0], [*before[:-1], sum(rows)], product.name)
    sizes = ir.Value(name=f"{product.name}/rows", const_value=ir.tensor(rows, dtype=ir.DataType.INT64))
    sizes.dtype, sizes.shape = ir.DataType.INT64, ir.Shape([len(rows)])
    graph.register_initializer(sizes)
    split = ir.node(
        "Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=len(rows), name=f"{first.name}/split"
    )
    graph.insert_before(first, [transpose, product, split])
    graph.inputs.append(weight)
    for old, part, new in zip(products, weights, split.outputs, strict=True):
        output = old.outputs[0]
        new.type, new.shape, name = output.type, output.shape, output.name
        ir.convenience.replace_all_uses_with(output, new, replace_graph_outputs=True)
        output.name, new.name = None, name
        old_transpose = old.inputs[1].producer() if old.inputs[1] is not None else None
        graph.remove(old, safe=True)
        if old_transpose is not None:
            graph.remove(old_transpose, safe=True)
        graph.inputs.remove(part)
    return weight


def _describe(value: ir.Value, like: ir.Value, shape: Sequence[object], name: str | None) -> None:
    value.name, value.type, value.shape = name, like.type, ir.Shape(shape)
