"""Matrix products of the same activations as one: the projections to queries, keys and values, an MLP's gate and up.

A step of few tokens reads every weight once and does little else, and it takes each product a while until the memory is
busy.  The rows of a joint weight are its parts' rows, one part after another: a joint input needs no copy of them, only
that its parts lie side by side.  Nor does the split behind the product: what comes after it reads its part in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import onnx_ir as ir

from socket_trt.onnx.initializers import add_integers
from socket_trt.onnx.values import describe

_SEPARATOR = "+"  # in no name that PyTorch gives a parameter


def parts_of(name: str) -> tuple[str, ...]:
    """Names of the weights that an input of a network holds: several for a joint one."""
    return tuple(name.split(_SEPARATOR))


def join_products(graph: ir.Graph, weights: Sequence[ir.Value], alone: Collection[ir.Value]) -> list[ir.Value]:
    """Rewrite the graph in place; returns its weights, joint ones at the end in place of their parts.

    weights  inputs of the graph
    alone    of them, those that share their bytes with no other: a weight has one place in memory

    A product is joined where its right operand is a weight, transposed, that nothing else uses.
    """
    groups: dict[tuple[ir.Value | None, object], list[Product]] = {}
    for node in graph:
        product = product_of(node)
        if product is not None and product.weight in alone:
            groups.setdefault((node.inputs[0], product.weight.dtype), []).append(product)
    joint: list[ir.Value] = []
    parts: set[ir.Value] = set()
    for products in groups.values():
        if len(products) > 1:
            joint.append(_join(graph, products))
            parts.update(product.weight for product in products)
    return [*(weight for weight in weights if weight not in parts), *joint]


@dataclasses.dataclass(frozen=True)
class Product:
    """The product x W^T, W [rows, columns], in two nodes."""

    weight: ir.Value
    rows: int
    columns: int
    transpose: ir.Node
    product: ir.Node


def product_of(node: ir.Node) -> Product | None:
    """The product that ends in `node`, where nothing else uses its weight."""
    right = node.inputs[1] if node.op_type == "MatMul" else None
    transpose = right.producer() if right is not None and len(right.uses()) == 1 else None
    if transpose is None or transpose.op_type != "Transpose":
        return None
    weight = transpose.inputs[0]
    if weight is None or len(weight.uses()) > 1 or weight.shape is None or len(weight.shape) != 2:
        return None
    rows, columns = weight.shape.numpy()
    return Product(weight, rows, columns, transpose, node)


def _join(graph: ir.Graph, products: list[Product]) -> ir.Value:
    """Put one product and a split in the place of `products`; returns the joint weight, an input."""
    first, rows = products[0], [product.rows for product in products]
    name, old = str(first.product.name), [product.product.outputs[0] for product in products]
    weight = ir.Value(
        name=_SEPARATOR.join(str(product.weight.name) for product in products),
        type=first.weight.type,
        shape=ir.Shape([sum(rows), first.columns]),
    )
    transpose = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{name}/joint_weight")
    describe(transpose, weight, [first.columns, sum(rows)])
    product = ir.node("MatMul", [first.product.inputs[0], transpose.outputs[0]], name=f"{name}/joint")
    describe(product, old[0], None if old[0].shape is None else [*old[0].shape[:-1], sum(rows)])
    sizes = add_integers(graph, f"{product.name}/rows", rows)
    split = ir.node("Split", [*product.outputs, sizes], {"axis": -1}, num_outputs=len(rows), name=f"{name}/split")
    graph.inputs.append(weight)
    ir.convenience.replace_nodes_and_values(
        graph,
        first.product,
        [node for product in products for node in (product.product, product.transpose)],
        [transpose, product, split],
        old,
        split.outputs,
    )
    for product in products:
        graph.inputs.remove(product.weight)
    return weight
