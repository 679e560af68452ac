"""Rotary embedding with fewer kernels: halves of a head change places by reading an axis of two backwards.

Transformers writes x cos + rotate(x) sin, where rotate(x) puts the negated second half in front of the first.  TensorRT 8.6
takes a kernel for each half and one to join them.  A slice with a step of -1 is one, and the sign goes to the sines,
once for all layers that share them.  Products with 1 and -1 are exact: the sums are the same numbers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from socket_trt.onnx.initializers import add_initializer, add_integers
from socket_trt.onnx.values import describe, part_of, remove_unused


def rotate_by_one_slice(graph: ir.Graph) -> None:
    """Rewrite the graph in place; the values that products with sines give keep their names."""
    signed: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        source = rotated(node)
        turned = node.outputs[0]
        products = [user for user, _ in turned.uses()]
        if source is None or not products or any(product.op_type != "Mul" for product in products):
            continue
        swapped = _swap_halves(graph, node, source)
        for product in products:
            index = 0 if product.inputs[1] is turned else 1
            sines = product.inputs[index]
            assert sines is not None
            if sines not in signed:
                signed[sines] = _sign(graph, sines, turned)
            product.replace_input_with(index, signed[sines])
            product.replace_input_with(1 - index, swapped)
        remove_unused(graph, node)


def rotated(node: ir.Node) -> ir.Value | None:
    """x, where `node` joins the negated second half of x's last axis and the first half; else None."""
    if node.op_type != "Concat" or len(node.inputs) != 2 or node.attributes.get_int("axis", 0) not in (-1, _last(node)):
        return None
    negated, first = node.inputs
    negation = negated.producer() if negated is not None else None
    if negation is None or negation.op_type != "Neg":
        return None
    begin, end = part_of(negation.inputs[0]), part_of(first)
    if begin is None or end is None or begin[0] is not end[0] or begin[0].shape is None:
        return None
    source, size = begin[0], begin[0].shape[-1]
    if not isinstance(size, int) or size % 2:
        return None
    halves = begin[1] == size // 2 and begin[2] >= size and end[1:] == (0, size // 2)
    return source if halves else None


def _last(node: ir.Node) -> int:
    shape = node.outputs[0].shape
    return -1 if shape is None else len(shape) - 1


def _swap_halves(graph: ir.Graph, before: ir.Node, source: ir.Value) -> ir.Value:
    """`source` with the halves of its last axis exchanged, in front of `before`."""
    assert source.shape is not None
    name, outer, size = str(before.name), list(source.shape[:-1]), source.shape[-1]
    assert isinstance(size, int)
    as_it_is = [0] * len(outer)  # of Reshape: the same length
    halves = ir.node(
        "Reshape",
        [source, add_integers(graph, f"{name}/halves/shape", [*as_it_is, 2, size // 2])],
        name=f"{name}/halves",
    )
    describe(halves, source, [*outer, 2, size // 2])
    axis = add_integers(graph, f"{name}/swapped/axis", [len(outer)])
    first, last = (add_integers(graph, f"{name}/swapped/{what}", [at]) for what, at in (("first", 1), ("last", -3)))
    backwards = add_integers(graph, f"{name}/swapped/step", [-1])
    swapped = ir.node("Slice", [halves.outputs[0], first, last, axis, backwards], name=f"{name}/swapped")
    describe(swapped, source, [*outer, 2, size // 2])
    joined = ir.node(
        "Reshape",
        [swapped.outputs[0], add_integers(graph, f"{name}/joined/shape", [*as_it_is, size])],
        name=f"{name}/joined",
    )
    describe(joined, source, [*outer, size])
    graph.insert_before(before, [halves, swapped, joined])
    return joined.outputs[0]


def _sign(graph: ir.Graph, sines: ir.Value, rotated: ir.Value) -> ir.Value:
    """The sines, those of a head's first half negated."""
    assert rotated.shape is not None
    assert rotated.dtype is not None
    half = int(rotated.shape[-1]) // 2
    name = f"{sines.name}/signed"
    signs = ir.tensor(np.repeat([-1, 1], half).astype(rotated.dtype.numpy()), name=f"{name}/signs")
    product = ir.node("Mul", [sines, add_initializer(graph, f"{name}/signs", signs)], name=name)
    describe(product, sines, sines.shape)
    producer = sines.producer()
    if producer is None:
        graph.insert_before(graph[0], product)
    else:
        graph.insert_after(producer, product)
    return product.outputs[0]
