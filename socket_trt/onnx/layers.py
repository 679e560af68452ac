"""What lies around attention as nodes of plugins, for TensorRT 8.6: products, norms, rotary embeddings, gates.

It makes a norm of seven kernels and a rotary embedding of as many, and has no kernels of its own for Hopper's products of
few tokens.  A node takes the place of those that compute the same; what has another form stays as it is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from socket_trt import names
from socket_trt.onnx.joined import product_of
from socket_trt.onnx.rotary import rotated
from socket_trt.onnx.values import constant_number, describe, part_of, remove_unused

_FLOAT16 = ir.DataType.FLOAT16


def layers_by_plugins(graph: ir.Graph) -> None:
    """Rewrite the graph, whose hidden states are [tokens, hidden], in place; values that stay keep their names."""
    for rewrite in (_product, _head, _norm, _gate):
        for node in list(graph):
            if node.graph is graph:
                rewrite(graph, node)
    for node in list(graph):
        if node.op_type == names.OPERATOR:
            _rotary(graph, node)


def _product(graph: ir.Graph, node: ir.Node) -> None:
    """Activations [tokens, columns] times a weight [rows, columns], transposed."""
    product = product_of(node)
    activations = node.inputs[0] if node.inputs else None
    if product is None or not _is_matrix(activations) or not _is_weight(product.weight, 2):
        return
    _replace(graph, node, names.LINEAR, [activations, product.weight], node.outputs)


def _head(graph: ir.Graph, node: ir.Node) -> None:
    """Logits of some tokens, whose hidden states the exporter looks up as [tokens, 1, hidden], as a product of matrices.

    It computes [1, sequences, vocabulary], may cap that element by element, and takes index 0: all of it has two axes here.
    """
    weight = _source(node.inputs[1], "Transpose") if node.op_type == "MatMul" else None
    lookup = _producer(_source(node.inputs[0], "Transpose")) if weight is not None else None
    if weight is None or weight.shape is None or not _is_weight(weight, 2) or lookup is None:
        return
    hidden = _source(_source(lookup.inputs[0], "Transpose"), "Unsqueeze")
    tokens = _source(lookup.inputs[1], "Unsqueeze")
    chain = _elementwise_until_first(node)
    if lookup.op_type != "GatherND" or not _is_matrix(hidden) or tokens is None or tokens.shape is None or not chain:
        return
    rows = ir.node("Gather", [hidden, tokens], {"axis": 0}, name=f"{node.name}/rows")
    describe(rows, node.outputs[0], [tokens.shape[0], weight.shape[1]])
    product = _plugin(names.LINEAR, [rows.outputs[0], weight], 1, f"{node.name}/matrix")
    describe(product, node.outputs[0], [tokens.shape[0], weight.shape[0]])
    graph.insert_before(node, [rows, product])
    *capping, first = chain
    last = product.outputs[0]
    for one in capping:
        one.replace_input_with(0, last)
        last = one.outputs[0]
        last.shape = product.outputs[0].shape
    _take_over(graph, [first.outputs[0]], [last])
    remove_unused(graph, node)


def _norm(graph: ir.Graph, node: ir.Node) -> None:
    """The norm of hidden states, x / sqrt(mean(x^2) + epsilon), times a weight; with the sum of two that it is of."""
    norm = next(itertools.chain(_norms_rounded_first(node), _norms_rounded_last(node)), None)
    if norm is None:
        return
    attributes = [ir.AttrFloat32("epsilon", norm.epsilon), ir.AttrInt64("plus_one", int(norm.plus_one))]
    add = _producer(norm.source)
    if add is not None and _is_sum(add):
        outputs = [norm.source, node.outputs[0]]
        _replace(graph, add, names.ADD_RMS_NORM, [*add.inputs, norm.weight], outputs, attributes)
    else:
        _replace(graph, node, names.RMS_NORM, [norm.source, norm.weight], node.outputs, attributes)


@dataclasses.dataclass(frozen=True)
class _Norm:
    source: ir.Value
    weight: ir.Value
    epsilon: float
    plus_one: bool


def _norms_rounded_first(node: ir.Node) -> Iterator[_Norm]:
    """Weight * float16(x / root)."""
    for weight, scaled in _factors(node):
        found = _scaled(_source(scaled, "Cast"))
        if found is not None and _is_weight(weight, 1):
            yield _Norm(found[0], weight, found[1], plus_one=False)


def _norms_rounded_last(node: ir.Node) -> Iterator[_Norm]:
    """float16(x / root * (1 + weight)), as Gemma has it."""
    if node.op_type != "Cast" or node.outputs[0].dtype != _FLOAT16:
        return
    for scaled, factor in _factors(_producer(node.inputs[0])):
        found, weight = _scaled(scaled), _source(_source(factor, "Add"), "Cast")
        adds_one = constant_number(_source(factor, "Add", 1)) == 1
        if found is not None and weight is not None and adds_one and _is_weight(weight, 1):
            yield _Norm(found[0], weight, found[1], plus_one=True)


def _scaled(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """(x, epsilon), where `value` is x / sqrt(mean(x^2) + epsilon) in float32 and x is float16."""
    for x, root in _factors(_producer(value)):
        radicand, source = _source(_source(root, "Reciprocal"), "Sqrt"), _source(x, "Cast")
        epsilon = constant_number(_source(radicand, "Add", 1))
        is_wide = source is not None and source.dtype == _FLOAT16 and source.shape is not None and len(source.shape) > 1
        if source is not None and is_wide and epsilon is not None and _is_mean_square(_source(radicand, "Add"), x):
            return source, epsilon
    return None


def _gate(graph: ir.Graph, node: ir.Node) -> None:
    """Gate * sigmoid(gate) * up, where gate and up are the halves of a matrix."""
    for up, product in _factors(node):
        for gate, sigmoid in _factors(_producer(product)):
            first, second = part_of(gate), part_of(up)
            if _source(sigmoid, "Sigmoid") is not gate or first is None or second is None:
                continue
            (joint, begin, middle), (other, next_begin, end) = first, second
            columns = joint.shape[-1] if joint.shape is not None else None
            if joint is other and _is_matrix(joint) and (begin, middle, end) == (0, next_begin, columns):
                if middle * 2 == end:
                    _replace(graph, node, names.SWIGLU, [joint], node.outputs)
                return


def _rotary(graph: ir.Graph, attention: ir.Node) -> None:
    """The queries, keys and values of an attention node, where they are the parts of one matrix."""
    query, key = _Rotated.of(attention.inputs[0]), _Rotated.of(attention.inputs[1])
    if query is None or key is None or (query.cosines, query.sines) != (key.cosines, key.sines):
        return
    parts = [_heads(value) for value in (query.source, key.source, attention.inputs[2])]
    if any(part is None for part in parts):
        return
    (joint, begin, middle), (joint_of_key, begin_key, end_key), (joint_of_value, begin_value, end_value) = (
        part for part in parts if part is not None
    )
    shapes = [value.shape for value in attention.inputs[:3] if value is not None]
    columns = joint.shape[-1] if joint.shape is not None else None
    together = joint is joint_of_key is joint_of_value and _is_matrix(joint)
    if not together or (begin, middle, end_key, end_value) != (0, begin_key, begin_value, columns):
        return
    heads = [shape[1] for shape in shapes if shape is not None]
    if not all(isinstance(count, int) for count in heads):
        return
    attributes = [ir.AttrInt64("query_heads", int(heads[0])), ir.AttrInt64("kv_heads", int(heads[1]))]
    old = [value for value in attention.inputs[:3] if value is not None]
    _replace(graph, attention, names.SPLIT_ROTARY, [joint, query.cosines, query.sines], old, attributes)


@dataclasses.dataclass(frozen=True)
class _Rotated:
    """x cosines + rotate(x) sines: x [1, heads, tokens, head size]; cosines, sines [tokens, head size]."""

    source: ir.Value
    cosines: ir.Value
    sines: ir.Value

    @staticmethod
    def of(value: ir.Value | None) -> _Rotated | None:
        add = _producer(value)
        if add is None or add.op_type != "Add":
            return None
        for straight, crossed in _both_ways(add):
            for x, cosines in _factors(_producer(straight)):
                for turned, sines in _factors(_producer(crossed)):
                    turn = _producer(turned)
                    if turn is not None and rotated(turn) is x:
                        tables = [_matrix_behind(table) for table in (cosines, sines)]
                        if tables[0] is not None and tables[1] is not None:
                            return _Rotated(x, tables[0], tables[1])
        return None


def _matrix_behind(value: ir.Value) -> ir.Value | None:
    """The matrix that `value` is with leading axes of one."""
    while not _is_matrix(value):
        source = _source(value, "Unsqueeze")
        if source is None:
            return None
        value = source
    return value


def _heads(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """The columns of a matrix, (matrix, first, last), that `value`, [1, heads, tokens, head size], has as heads."""
    transpose = _producer(value)
    if transpose is None or transpose.op_type != "Transpose" or _permutation(transpose) != [0, 2, 1, 3]:
        return None
    return part_of(_source(transpose.inputs[0], "Reshape"))


def _permutation(transpose: ir.Node) -> list[int]:
    return list(transpose.attributes["perm"].as_ints()) if "perm" in transpose.attributes else []


def _elementwise_until_first(node: ir.Node) -> list[ir.Node]:
    """The nodes, one behind another, that change what `node` gives element by element, and the one that takes index 0.

    Empty where anything else reads it.
    """
    chain: list[ir.Node] = []
    while True:
        readers = [user for user, _ in node.outputs[0].uses()]
        if len(readers) != 1 or node.outputs[0].is_graph_output() or readers[0].inputs[0] is not node.outputs[0]:
            return []
        node = readers[0]
        chain.append(node)
        if node.op_type == "Gather":
            index = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
            at_0 = index is not None and index.numpy().shape == () and int(index.numpy()) == 0
            return chain if at_0 and node.attributes.get_int("axis", 0) == 0 else []
        scalars = all(constant_number(value) is not None for value in node.inputs[1:])
        if node.op_type not in ("Div", "Mul", "Tanh") or not scalars:
            return []


def _is_mean_square(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether `value` is the mean of x * x over the last axis."""
    node = _producer(value)
    if node is None or node.op_type != "ReduceMean" or "axes" not in node.attributes:
        return False
    square = _producer(node.inputs[0])
    axes, rank = list(node.attributes["axes"].as_ints()), len(x.shape) if x.shape is not None else 0
    return (
        axes in ([-1], [rank - 1])
        and square is not None
        and square.op_type == "Mul"
        and all(i is x for i in square.inputs)
    )


def _is_sum(node: ir.Node) -> bool:
    return node.op_type == "Add" and all(_is_matrix(value) for value in node.inputs)


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == _FLOAT16 and value.shape is not None and len(value.shape) == 2


def _is_weight(value: ir.Value | None, rank: int) -> bool:
    """Whether nothing in a step writes it: kernels ask for weights before what is in front of them has ended."""
    return (
        value is not None
        and value.producer() is None
        and value.dtype == _FLOAT16
        and value.shape is not None
        and len(value.shape) == rank
    )


def _producer(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain in ("", "ai.onnx") else None


def _source(value: ir.Value | None, op_type: str, index: int = 0) -> ir.Value | None:
    """What the operator that gives `value` takes, if it is an `op_type`."""
    node = _producer(value)
    return node.inputs[index] if node is not None and node.op_type == op_type else None


def _factors(node: ir.Node | None) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The two factors of a product, both ways round; nothing of another node."""
    if node is not None and node.op_type == "Mul":
        yield from _both_ways(node)


def _both_ways(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    one, other = node.inputs
    assert one is not None
    assert other is not None
    yield one, other
    yield other, one


def _replace(
    graph: ir.Graph,
    place: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    old: Sequence[ir.Value],
    attributes: Sequence[ir.Attr] = (),
) -> None:
    """A node of a plugin in front of `place`, for the values `old`, which it takes over; their producers go."""
    first = old[0].producer()
    assert first is not None
    node = _plugin(kind, inputs, len(old), first.name, attributes)
    graph.insert_before(place, node)
    _take_over(graph, old, node.outputs)


def _plugin(
    kind: str, inputs: Sequence[ir.Value | None], outputs: int, name: str | None, attributes: Sequence[ir.Attr] = ()
) -> ir.Node:
    fields = [
        ir.AttrString("plugin_version", str(names.LAYER_VERSION)),
        ir.AttrString("plugin_namespace", names.DOMAIN),
        *attributes,
    ]
    return ir.Node(names.DOMAIN, kind, inputs, fields, num_outputs=outputs, name=name)


def _take_over(graph: ir.Graph, old: Sequence[ir.Value], new: Sequence[ir.Value]) -> None:
    """Give `new` the names, types and readers of `old`, and remove what computed these."""
    producers = [value.producer() for value in old]
    for value, other in zip(old, new, strict=True):
        name = value.name
        other.type, other.shape = value.type, value.shape
        value.name = f"{name}/replaced"
        other.name = name
        ir.convenience.replace_all_uses_with(value, other, replace_graph_outputs=True)
    for producer in producers:
        if producer is not None:
            remove_unused(graph, producer)
