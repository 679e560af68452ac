"""Hidden states as [tokens, hidden] instead of [1, tokens, hidden].

TensorRT 8.6 knows a dozen memory layouts of a tensor of three axes and times every layer, and every change between two
layouts, for each of them; of a matrix it knows one.  Without this pass the plan of a 32-layer model takes minutes.
"""

from __future__ import annotations

import onnx_ir as ir

from socket_trt.onnx.initializers import add_integers
from socket_trt.onnx.values import constant_integers

# Operators that treat every element, or every row of the last axis, alike.
_ELEMENTWISE = {
    "Add", "Cast", "Cos", "Div", "Erf", "Exp", "Gelu", "Identity", "Max", "Min", "Mul", "Neg", "Reciprocal", "Relu",
    "Sigmoid", "Sin", "Sqrt", "Sub", "Tanh",
}  # fmt: skip


def drop_leading_one(graph: ir.Graph) -> None:
    """Rewrite the graph in place; values that become matrices keep their names."""
    _Pass(graph).run()


class _Pass:
    """`self._flat` has the values that have lost their leading axis."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._flat: set[ir.Value] = set()
        self._restored: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        for node in list(self._graph):
            if self._begins(node) or self._goes_on(node):
                for output in node.outputs:
                    assert output.shape is not None
                    output.shape = ir.Shape(output.shape[1:])
                    self._flat.add(output)
            else:
                self._restore_inputs(node)

    def _begins(self, node: ir.Node) -> bool:
        """Whether `node` makes [1, tokens, hidden] of something else, which it then does without the leading axis."""
        if len(node.outputs) != 1 or not _is_wide(node.outputs[0]) or any(v in self._flat for v in node.inputs):
            return False
        if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
            indices = node.inputs[1]
            producer = indices.producer() if indices is not None else None
            if producer is None or producer.op_type != "Unsqueeze" or constant_integers(producer.inputs[1]) != [0]:
                return False
            node.replace_input_with(1, producer.inputs[0])
            return True
        if node.op_type == "Unsqueeze" and constant_integers(node.inputs[1]) == [0, 2]:
            node.replace_input_with(1, add_integers(self._graph, f"{node.name}/axes", [1]))
            return True
        if node.op_type == "Reshape":
            shape = constant_integers(node.inputs[1])
            if shape is None or 0 in shape or shape[0] != 1:
                return False
            node.replace_input_with(1, add_integers(self._graph, f"{node.name}/shape", shape[1:]))
            return True
        return False

    def _goes_on(self, node: ir.Node) -> bool:
        """Whether `node` takes values without their leading axis and gives such; its attributes are then adapted."""
        flat = [value is not None and value in self._flat for value in node.inputs]
        if not any(flat) or node.domain not in ("", "ai.onnx") or not all(_is_wide(value) for value in node.outputs):
            return False
        if node.op_type in _ELEMENTWISE:
            return all(is_flat or _rank(value) in (0, 1) for is_flat, value in zip(flat, node.inputs, strict=True))
        if node.op_type == "MatMul":
            return flat == [True, False] and _rank(node.inputs[1]) == 2
        if node.op_type in ("Concat", "Split"):
            axis = _without_first(node.attributes.get_int("axis", 0))
            if axis is None or (node.op_type == "Concat" and not all(flat)):
                return False
            node.attributes["axis"] = ir.AttrInt64("axis", axis)
            return True
        if node.op_type == "ReduceMean" and "axes" in node.attributes:
            axes = [_without_first(axis) for axis in node.attributes["axes"].as_ints()]
            if None in axes or not node.attributes.get_int("keepdims", 1):
                return False
            node.attributes["axes"] = ir.AttrInt64s("axes", [axis for axis in axes if axis is not None])
            return True
        if node.op_type == "Slice" and len(node.inputs) > 3:
            axes = [_without_first(axis) for axis in constant_integers(node.inputs[3]) or [0]]
            if None in axes:
                return False
            node.replace_input_with(
                3, add_integers(self._graph, f"{node.name}/axes", [axis for axis in axes if axis is not None])
            )
            return True
        return False

    def _restore_inputs(self, node: ir.Node) -> None:
        """Give `node` its inputs with the leading axis, where it can't do without; Reshape mostly can."""
        for index, value in enumerate(node.inputs):
            if value is None or value not in self._flat:
                continue
            if node.op_type == "Reshape" and index == 0 and 0 not in (constant_integers(node.inputs[1]) or [0]):
                continue
            if value not in self._restored:
                self._restored[value] = self._restore(value)
            node.replace_input_with(index, self._restored[value])

    def _restore(self, value: ir.Value) -> ir.Value:
        producer = value.producer()
        assert producer is not None
        assert value.shape is not None
        name = f"{value.name}/wide"
        node = ir.node("Unsqueeze", [value, add_integers(self._graph, f"{name}/axes", [0])], name=name)
        output = node.outputs[0]
        output.name, output.type, output.shape = name, value.type, ir.Shape([1, *value.shape])
        self._graph.insert_after(producer, node)
        return output


def _without_first(axis: int) -> int | None:
    """`axis` of what is left of three axes; None for the first of them."""
    return None if axis in (0, -3) else axis - 1 if axis > 0 else axis


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _is_wide(value: ir.Value) -> bool:
    return _rank(value) == 3 and value.shape is not None and value.shape[0] == 1
