"""What the rewriting steps share: reading constants, naming nodes in errors, and adding nodes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from socket_trt.onnx.initializers import add_initializer

MICROSOFT = "com.microsoft"


class MismatchError(Exception):
    """Why a node, a mask or a value does not have the form a rewriting step knows; becomes part of a GraphError."""


def describe(node: ir.Node) -> str:
    """A node as errors name it: name and operator."""
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"node '{node.name}' ({operator})"


def constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The value of a Constant node or an initializer, through Identity; None if there is none."""
    while value is not None and (node := producer(value, "Identity")) is not None:
        value = node.inputs[0]
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def integers(value: ir.Value | None) -> list[int] | None:
    """A constant of integers as a flat list; None for anything else, floats included."""
    array = constant(value)
    if array is None or not np.issubdtype(array.dtype, np.integer):
        return None
    return [int(x) for x in array.reshape(-1)]


def producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value` if it is of this domain and operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == domain else None


def dimension(value: ir.Value, axis: int) -> int | None:
    """A dimension that is a known number."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be absent, by its place or by its name being empty."""
    return node.inputs[index] if index < len(node.inputs) else None


def output_at(node: ir.Node, index: int) -> ir.Value | None:
    """An output that something may read; None where it is absent or has no name."""
    return node.outputs[index] if index < len(node.outputs) and node.outputs[index].name else None


def is_read(value: ir.Value | None) -> bool:
    return value is not None and (bool(value.uses()) or value.is_graph_output())


def descendants(values: list[ir.Value]) -> Iterator[ir.Node]:
    """The nodes that read one of the values, directly or not, in no particular order."""
    seen: set[ir.Node] = set()
    pending = list(values)
    while pending:
        for node in pending.pop().consumers():
            if node not in seen:
                seen.add(node)
                pending.extend(node.outputs)
                yield node


class NodeMaker:
    """Appends nodes and small constants to a graph; whoever uses it sorts the graph in the end."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._count = 0
        self._constants: dict[tuple[bytes, tuple[int, ...], str], ir.Value] = {}

    def many(
        self, outputs: int, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: object
    ) -> list[ir.Value]:
        """The outputs of a new node; attributes are given as Python values."""
        name = self._name(op_type)
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}.{index}"
        self.graph.append(node)
        return list(node.outputs)

    def __call__(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: object) -> ir.Value:
        """The one output of a new node."""
        return self.many(1, op_type, *inputs, domain=domain, **attributes)[0]

    def constant(self, array: npt.NDArray[np.generic]) -> ir.Value:
        """An initializer that holds the array; equal arrays share one."""
        key = (array.tobytes(), array.shape, str(array.dtype))
        if key not in self._constants:
            self._constants[key] = add_initializer(self.graph, self._name("constant"), ir.tensor(array))
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant(np.array(values, np.int64))

    def _name(self, what: str) -> str:
        self._count += 1
        return f"socket.{what}.{self._count}"
