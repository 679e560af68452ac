"""Put `SocketAttention` where an attention was, and packed tokens where padded batches were."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from socket_trt import names
from socket_trt.config import SocketConfig
from socket_trt.errors import GraphError
from socket_trt.onnx.initializers import add_initializer
from socket_trt.onnx.rewrite.found import Attention, Rotary
from socket_trt.onnx.rewrite.graph import (
    MICROSOFT,
    NodeMaker,
    constant,
    describe,
    dimension,
    integers,
    producer,
    rank,
)
from socket_trt.planes import draw_planes

_INT32 = ir.DataType.INT32
_STEP_DIMS = {
    names.INPUT_IDS: [names.DIM_TOKENS],
    names.POSITION_IDS: [names.DIM_TOKENS],
    names.LOGITS_INDICES: [names.DIM_SEQUENCES],
    names.PAGE_TABLE: [names.DIM_SEQUENCES, names.DIM_PAGES_PER_SEQUENCE],
    names.PAST_LENGTH: [names.DIM_SEQUENCES],
    names.QUERY_START: [names.DIM_BOUNDARIES],
}
# Operators between the last projection and the logits that treat every entry alike.
_ELEMENTWISE = {"Add", "Cast", "Div", "Identity", "Mul", "Sub", "Tanh"}
_PROJECTIONS = {("", "MatMul"), (MICROSOFT, "MatMulNBits"), (MICROSOFT, "FusedMatMul"), (MICROSOFT, "MatMulBnb4")}


def graph_value(name: str, dtype: ir.DataType, dims: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


class PackedGraph:
    """The new inputs and outputs of a graph, and the nodes between them and the old body.

    config     parameters of the method
    head_size  D of all attentions; dtype  T of all attentions
    """

    def __init__(self, graph: ir.Graph, config: SocketConfig, head_size: int, dtype: ir.DataType) -> None:
        self.make = NodeMaker(graph)
        self.config = config
        self.step = {name: graph_value(name, _INT32, list(dims)) for name, dims in _STEP_DIMS.items()}
        self.inputs: list[ir.Value] = list(self.step.values())
        self.outputs: list[ir.Value] = []
        planes = draw_planes(config.tables, config.planes, head_size, config.seed).astype(dtype.numpy())
        self._planes = add_initializer(self.make.graph, names.PLANES, ir.tensor(planes, dtype, name=names.PLANES))
        self._rotations: dict[ir.Value, ir.Value] = {}

    def batch_of_one(self, name: str, old: ir.Value) -> ir.Value:
        """A packed input in the type and rank in which the body reads it: [1, N], or [N] if it had no batch."""
        value = self.step[name]
        if old.dtype != _INT32:
            value = self.make("Cast", value, to=int(old.dtype))
        if rank(old) == 1:
            return value
        if rank(old) != 2:
            raise GraphError(
                f"graph input '{old.name}' has {rank(old)} dimensions; only [batch, sequence] can become packed tokens"
            )
        return self.make("Unsqueeze", value, self.make.ints(0))

    def replace(self, layer: int, attention: Attention) -> None:
        """Take an attention's place: same input and output tensors, cached in the pages of `layer`."""
        query, key, value = self._heads(attention)
        caches = self._cache_values(names.past, layer, attention)
        presents = self._cache_values(names.present, layer, attention)
        attributes = self.config.attributes(attention.scale, attention.sliding_window, attention.softcap)
        result, *after = self.make.many(
            len(names.OPERATOR_OUTPUTS),
            names.OPERATOR,
            query,
            key,
            value,
            *caches,
            *(self.step[name] for name in (names.PAGE_TABLE, names.PAST_LENGTH, names.QUERY_START)),
            self._planes,
            domain=names.DOMAIN,
            **attributes.as_dict(),
        )
        for present, value_after in zip(presents, after, strict=True):
            value_after.name, value_after.dtype, value_after.shape = present.name, present.dtype, present.shape
        result.dtype = attention.dtype
        if not attention.heads_first:
            width = attention.query_heads * attention.head_size
            tokens_first = self.make("Transpose", result, perm=[0, 2, 1, 3])
            result = self.make("Reshape", tokens_first, self.make.ints(0, 0, width))
        ir.convenience.replace_all_uses_with(attention.node.outputs[0], result)
        self.inputs += caches
        self.outputs += after

    def _heads(self, attention: Attention) -> list[ir.Value]:
        """Query, key and value as [1, H, N, D], after rotary embedding."""
        heads = [attention.query_heads, attention.kv_heads, attention.kv_heads]
        size = attention.head_size
        values = [attention.query, attention.key, attention.value]
        if attention.key is None:
            widths = self.make.ints(*(count * size for count in heads))
            values = self.make.many(3, "Split", attention.query, widths, axis=-1)
        if not attention.heads_first:
            shaped = [
                self.make("Reshape", v, self.make.ints(0, 0, h, size)) for v, h in zip(values, heads, strict=True)
            ]
            values = [self.make("Transpose", v, perm=[0, 2, 1, 3]) for v in shaped]
        if attention.rotary is not None:
            values[:2] = [self._rotate(v, attention.rotary) for v in values[:2]]
        return values

    def _rotate(self, value: ir.Value, rotary: Rotary) -> ir.Value:
        """Rotary embedding of [1, H, N, D] by the tokens' positions."""
        half = dimension(rotary.cos, 1)
        if half is None:
            raise GraphError(
                f"table '{rotary.cos.name}' has no fixed width; run ONNX shape inference on the model first"
            )
        cos, sin = self._at_positions(rotary.cos), self._at_positions(rotary.sin)
        last, whole, ones = self.make.ints(3), self.make.ints(2**31 - 1), self.make.ints(1)
        if rotary.interleaved:
            twos = self.make.ints(2)
            first = self.make("Slice", value, self.make.ints(0), self.make.ints(2 * half), last, twos)
            second = self.make("Slice", value, self.make.ints(1), self.make.ints(2 * half), last, twos)
        else:
            first = self.make("Slice", value, self.make.ints(0), self.make.ints(half), last, ones)
            second = self.make("Slice", value, self.make.ints(half), self.make.ints(2 * half), last, ones)
        turned = [
            self.make("Sub", self.make("Mul", first, cos), self.make("Mul", second, sin)),
            self.make("Add", self.make("Mul", second, cos), self.make("Mul", first, sin)),
        ]
        if rotary.interleaved:
            axis = self.make.ints(4)
            pairs = self.make("Concat", *(self.make("Unsqueeze", v, axis) for v in turned), axis=4)
            turned = [self.make("Reshape", pairs, self.make.ints(0, 0, 0, 2 * half))]
        rest = self.make("Slice", value, self.make.ints(2 * half), whole, last, ones)
        return self.make("Concat", *turned, rest, axis=3)

    def _at_positions(self, table: ir.Value) -> ir.Value:
        """[N, r / 2]; all layers share it."""
        if table not in self._rotations:
            self._rotations[table] = self.make("Gather", table, self.step[names.POSITION_IDS], axis=0)
        return self._rotations[table]

    def _cache_values(self, name: Callable[[int, str], str], layer: int, attention: Attention) -> list[ir.Value]:
        c, heads = self.config, attention.kv_heads
        tokens: list[int | str] = [names.DIM_PAGES, heads, c.page_size]
        dims: dict[str, list[int | str]] = {
            "key": [*tokens, attention.head_size],
            "value": [*tokens, attention.head_size],
            "code": [names.DIM_PAGES, heads, c.tables, c.code_words],
            "norm": tokens,
        }
        return [
            graph_value(name(layer, kind), _INT32 if kind == "code" else attention.dtype, dims[kind])
            for kind in names.CACHE_KINDS
        ]

    def take_logits(self, logits: ir.Value) -> bool:
        """Make float32 [sequences, V] of the old logits [1, N, V], as the graph's first output.

        Returns whether the rows could be chosen before the last projection (else after it).
        Raises GraphError where the graph computes the last token's logits only, and cannot be made to compute others.
        """
        indices = self.step[names.LOGITS_INDICES]
        projection = _last_projection(logits)
        if projection is not None:
            hidden, pruned = _before_pruning(projection.inputs[0])
            _check_all_tokens(hidden)
        if not (projection is not None and pruned) and dimension(logits, 1) is not None:
            raise GraphError(
                f"the logits are {list(logits.shape)}: the graph keeps a fixed number of tokens in a way that cannot be "
                "undone; export it with the logits of all tokens"
            )
        if projection is not None:
            projection.replace_input_with(0, self.make("Gather", hidden, indices, axis=1))
            rows = logits
        else:
            rows = self.make("Gather", logits, indices, axis=1)
        rows = self.make("Squeeze", rows, self.make.ints(0))
        result = self.make("Cast", rows, to=int(ir.DataType.FLOAT))
        vocabulary = dimension(logits, -1)
        logits.name = "socket.old.logits"
        result.name, result.dtype = names.LOGITS, ir.DataType.FLOAT
        result.shape = ir.Shape([names.DIM_SEQUENCES, vocabulary if vocabulary is not None else "vocabulary"])
        self.outputs.insert(0, result)
        return projection is not None


def _last_projection(logits: ir.Value) -> ir.Node | None:
    """The matrix product that makes the logits, if only elementwise operations with constants follow it."""
    value = logits
    while (node := value.producer()) is not None:
        if (node.domain, node.op_type) in _PROJECTIONS:
            others = node.inputs[1:]
            return node if rank(node.inputs[0]) in (None, 2, 3) and all(map(_is_weight, others)) else None
        if node.domain != "" or node.op_type not in _ELEMENTWISE:
            return None
        changing = [v for v in node.inputs if constant_size(v) is None]
        if len(changing) != 1:
            return None
        value = changing[0]
    return None


def constant_size(value: ir.Value) -> int | None:
    """Number of elements of a constant or an initializer, without reading it."""
    if value.is_initializer() and not value.is_graph_input():
        return int(value.const_value.size) if value.const_value is not None else None
    array = constant(value)
    return None if array is None else array.size


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a value is made of initializers alone: itself, transposed, cast or dequantised."""
    if value is None or value.is_initializer():
        return True
    node = value.producer()
    if node is None:
        return False
    return node.op_type in ("Constant", "Transpose", "Cast", "DequantizeLinear", "Identity") and all(
        map(_is_weight, node.inputs)
    )


def _before_pruning(hidden: ir.Value) -> tuple[ir.Value, bool]:
    """The hidden states of all tokens, where the graph chose some of them before the last projection."""
    chooser = hidden
    unsqueeze = producer(hidden, "Unsqueeze")
    if unsqueeze is not None and integers(unsqueeze.inputs[1]) in ([1], [-2]):
        chooser = unsqueeze.inputs[0]
    gather = producer(chooser, "Gather")
    if gather is not None and gather.attributes.get_int("axis", 0) in (1, -2):
        return gather.inputs[0], True
    cut = producer(hidden, "Slice")
    if cut is not None and len(cut.inputs) > 3 and integers(cut.inputs[3]) in ([1], [-2]):
        return cut.inputs[0], True
    return hidden, False


def _check_all_tokens(hidden: ir.Value) -> None:
    """Raise GraphError where tokens are chosen before the final norm, on a chain of nodes with one activation each."""
    value: ir.Value | None = hidden
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in ("Gather", "GatherElements", "GatherND", "Slice") and not _is_weight(node.inputs[0]):
            raise GraphError(
                f"{describe(node)} keeps some tokens only before the last projection; export the logits of all tokens"
            )
        activations = [v for v in node.inputs if not _is_weight(v)]
        value = activations[0] if len(activations) == 1 else None


def refuse_leftover(node: ir.Node) -> GraphError:
    return GraphError(
        f"{describe(node)} still depends on the padded batch (attention mask, past, or token count) and is not known to "
        "compute positions: export the model with position_ids as an input"
    )
