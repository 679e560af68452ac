"""Products of activations and weights as nodes of `Linear`, for the plugin that has cuBLAS compute them on TensorRT 8.6.

TensorRT 8.6 has no kernels of its own for Hopper's products of few tokens, and calls no library where weights are inputs.
"""

from __future__ import annotations

import onnx_ir as ir

from socket_trt import names
from socket_trt.onnx.joined import product_of
from socket_trt.onnx.values import describe


def products_by_plugin(graph: ir.Graph) -> None:
    """Rewrite the graph in place: float16 activations [tokens, columns] times a weight [rows, columns], transposed.

    The head stays as it is, its activations having three axes: TensorRT computes and casts logits by one kernel.
    """
    for node in list(graph):
        product = product_of(node)
        activations = node.inputs[0]
        if product is None or activations is None or activations.shape is None or len(activations.shape) != 2:
            continue
        if product.weight.dtype != ir.DataType.FLOAT16:
            continue
        old = node.outputs[0]
        linear = ir.node(
            names.LINEAR,
            [activations, product.weight],
            {"plugin_version": str(names.LINEAR_VERSION), "plugin_namespace": names.DOMAIN},
            domain=names.DOMAIN,
            name=node.name,
        )
        describe(linear, old, None if old.shape is None else list(old.shape))
        linear.outputs[0].name = old.name
        ir.convenience.replace_nodes_and_values(graph, node, [node, product.transpose], [linear], [old], linear.outputs)
