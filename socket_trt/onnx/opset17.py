"""From opset 18, the lowest that the exporter writes, to opset 17, the highest that TensorRT 8.6 reads.

Between the two, reductions other than ReduceSum moved their axes from an attribute to an input, and Split gained
`num_outputs`.  ONNX's version converter refuses graphs with custom operators, hence this pass.
"""

from __future__ import annotations

import onnx_ir as ir

from socket_trt.errors import GraphError

_REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSumSquare",
}  # fmt: skip
_NEW_IN_18 = {
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "Col2Im",
    "CenterCropPad",
    "GroupNormalization",
    "Mish",
}


def lower_to_opset17(model: ir.Model) -> None:
    """Rewrite the graph in place.  Raises GraphError where it uses what opset 17 does not have."""
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in _NEW_IN_18:
            raise GraphError(f"node {node.name}: opset 17 has no {node.op_type}; export for opset 18 or later")
        if node.op_type in _REDUCTIONS and len(node.inputs) > 1:
            _axes_to_attribute(node)
        elif node.op_type == "Split":
            _drop_num_outputs(node)
    model.graph.opset_imports[""] = 17
    model.ir_version = 8  # the ONNX release of opset 17
    model.graph.sort()


def _axes_to_attribute(node: ir.Node) -> None:
    axes = node.inputs[1]
    if axes is not None:
        constant = ir.convenience.get_const_tensor(axes)
        if constant is None:
            raise GraphError(f"node {node.name}: {node.op_type} has axes that are no constant; opset 17 wants one")
        node.attributes["axes"] = ir.AttrInt64s("axes", constant.numpy().tolist())
    node.attributes.pop("noop_with_empty_axes", None)
    node.resize_inputs(1)


def _drop_num_outputs(node: ir.Node) -> None:
    """`num_outputs` splits evenly up to a shorter last part; opset 17 splits evenly, or by given sizes."""
    if node.attributes.pop("num_outputs", None) is None:
        return
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    axis = node.attributes.get_int("axis", 0)
    size = shape[axis] if shape is not None else None
    if not isinstance(size, int) or size % len(node.outputs):
        raise GraphError(
            f"node {node.name}: Split into {len(node.outputs)} parts of an axis not known to divide evenly"
        )
