"""Run the part of a graph that knows only sizes, positions and padding, to see what a mask or an index really holds.

Exporters write the same mask in many ways; what it admits is the same, and can be seen by computing it.  Nothing here
reads a weight: a value that depends on one, or on a cache's content, is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from socket_trt import names
from socket_trt.onnx.rewrite.graph import MismatchError, descendants, describe, rank

ATTENTION_MASK = "attention_mask"
CACHE_POSITION = "cache_position"
_STEP_ROLES = (names.INPUT_IDS, names.POSITION_IDS, ATTENTION_MASK, CACHE_POSITION)
_MAX_CONSTANT = 1 << 16  # elements: masks are made of scalars and short vectors, anything longer is a weight

Array = npt.NDArray[np.generic]


@dataclasses.dataclass(frozen=True)
class Situation:
    """Sizes of a padded batch: `past` cached and `tokens` new tokens a row, the first `padding[row]` of them unused."""

    tokens: int
    past: int
    padding: tuple[int, ...] = (0,)

    @property
    def batch(self) -> int:
        return len(self.padding)

    @property
    def length(self) -> int:
        return self.past + self.tokens

    def attention_mask(self) -> Array:
        """[batch, past + tokens], 0 where a row is padded on its left."""
        mask: Array = np.array(np.arange(self.length) >= np.array(self.padding)[:, None], np.int64)
        return mask

    def positions(self) -> Array:
        """[batch, tokens]: padding does not count."""
        count = np.arange(self.past, self.length) - np.array(self.padding)[:, None]
        positions: Array = np.maximum(count, 0)
        return positions


class Evaluator:
    """Computes values of a graph for a `Situation`; made before the graph is changed, used before and after."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self.roles: dict[ir.Value, str] = {}
        self.caches: list[ir.Value] = []
        for value in model.graph.inputs:
            if value.name in _STEP_ROLES:
                self.roles[value] = value.name
            elif rank(value) == 4 and value.dtype is not None and value.dtype.is_floating_point():
                self.caches.append(value)
        self._old_symbols = [(v, v.shape) for v in (*self.roles, *self.caches)]

    def run(self, values: Sequence[ir.Value], situations: Sequence[Situation]) -> list[list[Array]]:
        """The values in every situation.

        Raises MismatchError where one of them depends on more than sizes, positions and padding.
        """
        cut = _Cut(self, values)
        part = cut.model(self._model).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            session = onnxruntime.InferenceSession(part, options, providers=["CPUExecutionProvider"])
            return [list(session.run(None, cut.feeds(situation))) for situation in situations]
        except MismatchError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise MismatchError(f"cannot be computed on its own ({str(error).splitlines()[0]})") from None

    def largest(self, value: ir.Value, situation: Situation) -> int:
        """Elements of the largest tensor that computing `value` makes."""
        between = [v for node in _Cut(self, [value]).nodes for v in node.outputs if v.name]
        return max((array.size for array in self.run([value, *between], [situation])[0]), default=0)

    def integer_constants(self, value: ir.Value) -> list[int]:
        """Every integer written into the computation of `value`: a window's width is one of them."""
        found: set[int] = set()
        for initializer in _Cut(self, [value]).initializers.values():
            array = np.asarray(initializer.const_value.numpy())
            if array.dtype.kind in "iuf":
                found.update(int(x) for x in array.reshape(-1) if np.isfinite(x))
        return sorted(found)

    def input_array(self, value: ir.Value, situation: Situation) -> Array:
        """What is fed to a graph input: the old, padded form of it or the new, packed one."""
        role = self.roles[value]
        if role == ATTENTION_MASK:
            array = situation.attention_mask()
        elif role == names.INPUT_IDS:
            array = np.zeros((situation.batch, situation.tokens), np.int64)
        else:
            array = situation.positions()
        if rank(value) == 1:
            array = array[0]
        return np.asarray(array, value.dtype.numpy())

    def shape(self, value: ir.Value, situation: Situation) -> list[int]:
        """The shape of a cache or of an activation, whose symbols are those of the graph's inputs."""
        if value in self.caches:
            sizes = [situation.batch, None, situation.past, None]
            return [
                known if known is not None else _number(value, dim)
                for known, dim in zip(sizes, value.shape, strict=True)
            ]
        symbols: dict[object, int] = {}
        for source, dims in self._old_symbols:
            if dims is None:
                continue
            sizes_of = (
                self.shape(source, situation) if source in self.caches else self.input_array(source, situation).shape
            )
            symbols.update({d.value: n for d, n in zip(dims, sizes_of, strict=False) if not isinstance(d, int)})
        if value.shape is None:
            raise MismatchError(f"the shape of '{value.name}' is not known")
        return [
            symbols[d.value] if not isinstance(d, int) and d.value in symbols else _number(value, d)
            for d in value.shape
        ]


def _number(value: ir.Value, dim: object) -> int:
    if not isinstance(dim, int):
        raise MismatchError(f"the size '{dim}' of '{value.name}' is not known")
    return dim


class _Cut:
    """The nodes behind some values, down to graph inputs, constants and the shapes of caches and activations."""

    def __init__(
        self, evaluator: Evaluator, values: Sequence[ir.Value], computable: dict[ir.Value, bool] | None = None
    ) -> None:
        self._evaluator = evaluator
        self._values = values
        self._computable: dict[ir.Value, bool] = {} if computable is None else computable
        self.nodes: dict[ir.Node, None] = {}
        self._inputs: dict[str, ir.Value] = {}
        self._shapes: dict[str, ir.Node] = {}
        self.initializers: dict[str, ir.Value] = {}
        seen: set[ir.Value] = set()
        pending: list[ir.Value] = list(values)
        while pending:
            value = pending.pop()
            if value is not None and value not in seen:
                seen.add(value)
                pending.extend(self._visit(value))

    def _visit(self, value: ir.Value) -> Sequence[ir.Value]:
        """Sort one value in; what it is made of remains to be visited."""
        node = value.producer()
        if value in self._evaluator.roles:
            self._inputs[value.name] = value
        elif value.is_graph_input():
            raise MismatchError(f"depends on the content of graph input '{value.name}'")
        elif node is None:
            if value.const_value is None or value.const_value.size > _MAX_CONSTANT:
                raise MismatchError(f"depends on the weight '{value.name}'")
            self.initializers[value.name] = value
        elif node.op_type == "Shape" and node.domain == "" and not self._can_compute(node.inputs[0]):
            self._shapes[value.name] = node
        elif node.op_type == "Constant" and (tensor := ir.convenience.get_const_tensor(value)) is not None:
            if tensor.size > _MAX_CONSTANT:
                raise MismatchError(f"depends on the weight '{value.name}'")
            self.initializers[value.name] = ir.Value(name=value.name, const_value=tensor)
        elif any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise MismatchError(f"depends on {describe(node)}, which has a subgraph")
        else:
            self.nodes[node] = None
            return tuple(node.inputs)
        return ()

    def _can_compute(self, value: ir.Value) -> bool:
        """Whether a shape can be left to the tensor itself; else it must follow from symbolic dimensions."""
        if value not in self._computable:
            self._computable[value] = False
            with contextlib.suppress(MismatchError):
                _Cut(self._evaluator, [value], self._computable)
                self._computable[value] = True
        return self._computable[value]

    def feeds(self, situation: Situation) -> dict[str, Array]:
        result = {name: self._evaluator.input_array(value, situation) for name, value in self._inputs.items()}
        for name, node in self._shapes.items():
            shape = self._evaluator.shape(node.inputs[0], situation)
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
            result[name] = np.array(shape[start:end], np.int64)
        return result

    def model(self, model: ir.Model) -> onnx.ModelProto:
        order = {node: index for index, node in enumerate(model.graph)}
        nodes = [ir.serde.serialize_node(node) for node in sorted(self.nodes, key=order.__getitem__)]
        inputs = [
            onnx.helper.make_tensor_value_info(name, int(value.dtype), None) for name, value in self._inputs.items()
        ] + [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in self._shapes]
        results = []
        for index, value in enumerate(self._values):
            # A value can be an input or a constant itself, hence the Identity.
            nodes.append(onnx.helper.make_node("Identity", [value.name], [f"socket.result.{index}"]))
            results.append(onnx.ValueInfoProto(name=f"socket.result.{index}"))
        constants = []
        for name, value in self.initializers.items():
            constants.append(ir.serde.serialize_tensor(value.const_value))
            constants[-1].name = name
            constants[-1].doc_string = ""
        graph = onnx.helper.make_graph(nodes, "part", inputs, results, constants)
        imports = [onnx.helper.make_opsetid(d, v) for d, v in model.graph.opset_imports.items()]
        return onnx.helper.make_model(graph, opset_imports=imports, ir_version=min(model.ir_version, onnx.IR_VERSION))


def reads_tokens_in_order(graph: ir.Graph, old_inputs: Sequence[ir.Value]) -> list[ir.Node]:
    """Nodes that depend on an old input, or count tokens by themselves, in the graph's order."""
    counting = [
        node
        for node in graph
        if node.domain == ""
        and node.op_type in ("Range", "CumSum", "NonZero", "EyeLike")
        and not all(v is None or ir.convenience.get_const_tensor(v) is not None for v in node.inputs)
    ]
    tainted = set(descendants([*old_inputs, *(out for node in counting for out in node.outputs)])) | set(counting)
    return [node for node in graph if node in tainted]
