"""From an engine directory's graph to the one that TensorRT parses.

The function body goes (versions of TensorRT's parser differ on whether a plugin or a body wins), and external weights
become inputs, so that the builder has nothing to fold and one plan runs any checkpoint of the same shapes.
"""

from __future__ import annotations

import collections
import dataclasses

import onnx_ir as ir

from socket_trt.onnx.initializers import add_integers
from socket_trt.onnx.joined import join_products
from socket_trt.onnx.layers import layers_by_plugins
from socket_trt.onnx.opset17 import lower_to_opset17
from socket_trt.onnx.rank2 import drop_leading_one
from socket_trt.onnx.rotary import rotate_by_one_slice
from socket_trt.onnx.values import constant_number


@dataclasses.dataclass(frozen=True)
class NetworkGraph:
    """A graph for TensorRT's parser.

    weights     inputs that hold weights, by name; in the model's dtype whatever the checkpoint's is.  Some hold the
                rows of several (`socket_trt.onnx.joined.parts_of`)
    transposed  values that are a weight with its last two axes swapped: operands of a matrix product
    float32     values that are float32 although the model's dtype is narrower
    float16     values that are float16
    """

    model: ir.Model
    weights: tuple[str, ...]
    transposed: tuple[str, ...]
    float32: frozenset[str]
    float16: frozenset[str]

    def serialize(self) -> bytes:
        return bytes(ir.to_proto(self.model).SerializeToString())


def network_graph(model: ir.Model, opset17: bool = False, cublas: bool = False) -> NetworkGraph:
    """Prepare `model`, which is changed in place.

    opset17  for TensorRT 8.6, whose parser knows no later one
    cublas   with it, what lies around attention as nodes of plugins, whose larger products cuBLAS computes

    External initializers become inputs; a cast from the checkpoint's dtype behind one goes.  A weight that is, transposed,
    the right operand of a product with three axes gets a leading axis of one: TensorRT then needs no reshape between them.
    Products of the same activations become one.  For TensorRT 8.6, hidden states become matrices, and the halves of a head
    change places by one slice.
    """
    model.functions.clear()
    if opset17 and model.graph.opset_imports[""] > 17:
        lower_to_opset17(model)
    _powers_by_products(model.graph)
    if opset17:
        drop_leading_one(model.graph)
    weights, alone = _weights_to_inputs(model.graph)
    weights = join_products(model.graph, weights, alone)
    if opset17 and cublas:
        layers_by_plugins(model.graph)
    if opset17:
        rotate_by_one_slice(model.graph)
    transposed = [name for weight in weights for name in _lead_with_one(model.graph, weight)]
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return NetworkGraph(
        model,
        tuple(str(value.name) for value in weights),
        tuple(transposed),
        frozenset(str(v.name) for v in values if v.dtype == ir.DataType.FLOAT),
        frozenset(str(v.name) for v in values if v.dtype == ir.DataType.FLOAT16),
    )


def embedded_graph(model: ir.Model, opset17: bool = False, cublas: bool = False) -> NetworkGraph:
    """`network_graph` for weights that stay initializers, which the parser reads from beside the graph."""
    kept = {}
    for name, value in list(model.graph.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor):
            kept[name] = value.const_value
            value.const_value = None
    graph = network_graph(model, opset17, cublas)
    for name, tensor in kept.items():
        model.graph.initializers[name].const_value = tensor
    return graph


def _powers_by_products(graph: ir.Graph) -> None:
    """x^2 and x^3 as products: right for negative x on every backend, and cheaper."""
    for node in list(graph):
        if node.op_type != "Pow" or node.domain not in ("", "ai.onnx"):
            continue
        base, exponent = node.inputs
        power = constant_number(exponent)
        if base is None or power not in (2, 3):
            continue
        old = node.outputs[0]
        product = _multiply(graph, node, base, base, old)
        if power == 3:
            product.name, product.outputs[0].name = f"{node.name}/square", f"{old.name}/square"
            product = _multiply(graph, product, product.outputs[0], base, old)
        product.name = node.name
        product.outputs[0].name = old.name
        ir.convenience.replace_all_uses_with(old, product.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _multiply(graph: ir.Graph, after: ir.Node, one: ir.Value, other: ir.Value, like: ir.Value) -> ir.Node:
    node = ir.node("Mul", [one, other])
    node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
    graph.insert_after(after, node)
    return node


def _weights_to_inputs(graph: ir.Graph) -> tuple[list[ir.Value], set[ir.Value]]:
    """All weights, and those of them whose bytes are no other's."""
    weights = {}
    for name, value in list(graph.initializers.items()):
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        weights[value] = (value.const_value.location, value.const_value.offset)
        users = [user for user, _ in value.uses()]
        if len(users) == 1 and users[0].name == f"{name}/cast":
            (cast,) = users
            value.type = cast.outputs[0].type
            ir.convenience.replace_all_uses_with(cast.outputs[0], value)
            graph.remove(cast, safe=True)
        value.const_value = None
        del graph.initializers[name]
        graph.inputs.append(value)
    times = collections.Counter(weights.values())
    return list(weights), {value for value, place in weights.items() if times[place] == 1}


def _lead_with_one(graph: ir.Graph, weight: ir.Value) -> list[str]:
    """Names of the products' operands behind `weight`: the weight as [1, rows, columns], with the last two swapped."""
    if weight.shape is None or len(weight.shape) != 2:
        return []
    users = [user for user, _ in weight.uses()]
    operands = [node for node in users if node.op_type == "Transpose" and _is_right_operand(node.outputs[0])]
    transposes = [node for node in operands if not _multiplies_a_matrix(node.outputs[0])]
    wide = weight
    if transposes and len(transposes) < len(users):  # a tied embedding is looked up in as well
        wide = _unsqueeze(graph, weight)
    if transposes:
        wide.shape = ir.Shape([1, *weight.shape])
    for node in transposes:
        node.replace_input_with(0, wide)
        node.attributes["perm"] = ir.AttrInt64s("perm", [0, 2, 1])
        shape = node.outputs[0].shape
        node.outputs[0].shape = ir.Shape([1, *shape]) if shape is not None else None
    return [str(node.outputs[0].name) for node in operands]


def _is_right_operand(value: ir.Value) -> bool:
    return bool(value.uses()) and all(user.op_type == "MatMul" and index == 1 for user, index in value.uses())


def _multiplies_a_matrix(value: ir.Value) -> bool:
    left = [user.inputs[0] for user, _ in value.uses()]
    return all(one is not None and one.shape is not None and len(one.shape) == 2 for one in left)


def _unsqueeze(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """`weight` with a leading axis of one, in a node before all others."""
    name = f"{weight.name}/wide"
    node = ir.node("Unsqueeze", [weight, add_integers(graph, f"{name}/axes", [0])], name=name)
    node.outputs[0].name, node.outputs[0].type = name, weight.type
    graph.insert_before(graph[0], node)
    return node.outputs[0]
