"""Rewrite a whole model in memory: find the attentions, replace them, and check that nothing old is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveInitializersFromInputsPass, RemoveUnusedNodesPass

from socket_trt import names
from socket_trt.config import SocketConfig
from socket_trt.errors import GraphError
from socket_trt.onnx import schema as _schema  # noqa: F401  (shape inference and checkers know the operator)
from socket_trt.onnx.function import MAX_OPSET, MIN_OPSET, function_body
from socket_trt.onnx.rewrite.evaluation import Evaluator, Situation, reads_tokens_in_order
from socket_trt.onnx.rewrite.found import Attention, AttentionPattern
from socket_trt.onnx.rewrite.graph import MICROSOFT, MismatchError, describe, dimension, rank
from socket_trt.onnx.rewrite.group_query import GroupQueryAttention
from socket_trt.onnx.rewrite.mask import MaskReader
from socket_trt.onnx.rewrite.opset23 import OnnxAttention
from socket_trt.onnx.rewrite.packed import PackedGraph, refuse_leftover

PATTERNS: tuple[AttentionPattern, ...] = (OnnxAttention(), GroupQueryAttention())

# Attention operators that no pattern rewrites; named so that a model with one of them is refused, not half rewritten.
_OTHER_ATTENTIONS = {
    (MICROSOFT, "Attention"),
    (MICROSOFT, "DecoderMaskedMultiHeadAttention"),
    (MICROSOFT, "DecoderMaskedSelfAttention"),
    (MICROSOFT, "GatedRelativePositionBias"),
    (MICROSOFT, "LinearAttention"),
    (MICROSOFT, "LongformerAttention"),
    (MICROSOFT, "MultiHeadAttention"),
    (MICROSOFT, "PackedAttention"),
    (MICROSOFT, "PackedMultiHeadAttention"),
    (MICROSOFT, "PagedAttention"),
    (MICROSOFT, "QAttention"),
    (MICROSOFT, "SparseAttention"),
    (names.DOMAIN, names.OPERATOR),
}
_BEFORE_SOFTMAX = {"Add", "Cast", "Div", "Identity", "Mul", "Tanh", "Where"}
_AFTER_SOFTMAX = {"Cast", "Dropout", "Identity"}

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# With batch one: what is the same in all of these does not depend on the step, what counts up is the position.  The
# far one tells a switch at some length (longrope) from a constant.
_CACHED_STEPS = [Situation(5, 0), Situation(3, 4), Situation(1, 9), Situation(2, (1 << 17) - 1)]
_UNCACHED_STEPS = [Situation(5, 0), Situation(3, 0), Situation(1, 0)]


@dataclasses.dataclass(frozen=True)
class ReplacedAttention:
    """One replaced attention: the old node's name and operator, and what the new one was told."""

    node: str
    operator: str
    query_heads: int
    kv_heads: int
    scale: float
    sliding_window: int
    softcap: float


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """What was done.

    attentions             the replaced ones, in the order of the layers
    opset                  of the model, before and after
    logits_before_lm_head  whether the wanted rows are chosen before the last projection
    """

    attentions: tuple[ReplacedAttention, ...]
    opset: int
    logits_before_lm_head: bool

    @property
    def replaced(self) -> int:
        return len(self.attentions)


def rewrite_model(model: ir.Model, config: SocketConfig, sliding_window: int | None = None) -> RewriteReport:
    """Make a causal LM on padded batches one on packed tokens and paged caches, in place.

    model           with inputs input_ids [B, S], attention_mask [B, T], position_ids [B, S] (each but the first may be
                    missing) and past keys and values [B, Hkv, P, D], outputs logits [B, S, V] and presents
    sliding_window  for masks that cannot be read: the number of tokens a query sees, or -1 for all; None refuses them

    Afterwards the graph has exactly the inputs and outputs of `names`, and carries the operator's function body.
    Raises GraphError where an attention, or anything else that depends on the padded batch, cannot be rewritten; the
    model is then in an undefined state.
    """
    opset = _checked_opset(model)
    if sliding_window is not None and (sliding_window == 0 or sliding_window < -1):
        raise GraphError(f"sliding window {sliding_window}: give a number of tokens, or -1 for none")
    RemoveInitializersFromInputsPass()(model)
    evaluator = Evaluator(model)
    attentions = find_attentions(model, MaskReader(evaluator, sliding_window))
    logits = _logits(model.graph, attentions)
    _check_inputs(model.graph, evaluator, attentions)
    packed = PackedGraph(model.graph, config, attentions[0].head_size, attentions[0].dtype)
    old_inputs = list(model.graph.inputs)
    _rename_old(model.graph, attentions)
    for layer, attention in enumerate(attentions):
        packed.replace(layer, attention)
    for old in old_inputs:
        role = evaluator.roles.get(old)
        if role in (names.INPUT_IDS, names.POSITION_IDS) and old.uses():
            ir.convenience.replace_all_uses_with(old, packed.batch_of_one(role, old))
            evaluator.roles[packed.step[role]] = role
    before_lm_head = packed.take_logits(logits)
    model.graph.outputs[:] = packed.outputs
    model.graph.inputs.extend(packed.inputs)
    _settle(model, evaluator, packed, old_inputs)
    model.graph.inputs[:] = packed.inputs
    _finish(model, opset)
    return RewriteReport(
        tuple(
            ReplacedAttention(
                a.node.name or "", a.node.op_type, a.query_heads, a.kv_heads, a.scale, a.sliding_window, a.softcap
            )
            for a in attentions
        ),
        opset,
        before_lm_head,
    )


def _checked_opset(model: ir.Model) -> int:
    opset = model.graph.opset_imports.get("")
    if opset is None or not MIN_OPSET <= opset <= MAX_OPSET:
        raise GraphError(f"the model is of ONNX opset {opset}; export it with an opset from {MIN_OPSET} to {MAX_OPSET}")
    return int(opset)


def find_attentions(model: ir.Model, masks: MaskReader) -> list[Attention]:
    """Every attention of the model in the graph's order.

    Raises GraphError naming the first node that is an attention and matches no pattern, or if there is none.
    """
    model.graph.sort()
    found: list[Attention] = []
    for node, why_not in _attention_like(model):
        pattern = next((p for p in PATTERNS if (p.domain, p.op_type) == (node.domain, node.op_type)), None)
        try:
            if why_not or pattern is None:
                raise MismatchError(why_not or "no pattern rewrites this operator")
            found.append(pattern.match(node, masks))
        except MismatchError as error:
            raise GraphError(
                f"{describe(node)} is an attention that cannot be rewritten, so nothing was: {error}"
            ) from None
    if not found:
        operators = ", ".join(f"{p.domain}::{p.op_type}".removeprefix("::") for p in PATTERNS)
        raise GraphError(f"the model has no attention; what can be rewritten: {operators}")
    first = found[0]
    if first.dtype not in _TYPES:
        raise GraphError(f"the attentions compute in {first.dtype}; convert the model to float32, float16 or bfloat16")
    for attention in found:
        if masks.given is not None and attention.sliding_window != masks.given:
            raise GraphError(
                f"{describe(attention.node)} has {_named(attention.sliding_window)}, but {_named(masks.given)} was given; "
                "leave it out"
            )
        if (attention.head_size, attention.dtype) != (first.head_size, first.dtype):
            raise GraphError(
                f"{describe(attention.node)} has head size {attention.head_size} in {attention.dtype}, the first attention "
                f"{first.head_size} in {first.dtype}: all must share one set of hyperplanes"
            )
    return found


def _named(window: int) -> str:
    return "no sliding window" if window < 0 else f"a sliding window of {window}"


def _attention_like(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Nodes that are an attention, each with the reason for which its place rules it out, if one does."""
    known = {(p.domain, p.op_type) for p in PATTERNS} | _OTHER_ATTENTIONS
    top = set(model.graph)
    nodes = [*model.graph.all_nodes(), *(node for function in model.functions.values() for node in function)]
    for node in nodes:
        outside = "" if node in top else "it lies in a subgraph or a function; inline that first"
        if (node.domain, node.op_type) in known:
            yield node, outside
        elif node.domain == "" and node.op_type == "Softmax" and _is_between_products(node):
            yield node, "it is written as MatMul-Softmax-MatMul; export it as one node, with sdpa at opset 23"


def _is_between_products(softmax: ir.Node) -> bool:
    """Whether a Softmax gets a matrix product's result and weighs the rows of another's."""
    after = list(softmax.outputs)
    weighs = False
    while after and not weighs:
        for node, index in after.pop().uses():
            weighs = weighs or (node.op_type == "MatMul" and index == 0)
            if node.op_type in _AFTER_SOFTMAX:
                after.extend(node.outputs)
    before, seen = [softmax.inputs[0]], set[ir.Node]()
    while before and weighs:
        node = before.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type == "MatMul":
            return True
        if node.op_type in _BEFORE_SOFTMAX:
            before.extend(v for v in node.inputs if v is not None)
    return False


def _logits(graph: ir.Graph, attentions: Sequence[Attention]) -> ir.Value:
    """The one output that is no present."""
    presents = {value for attention in attentions for value in attention.presents}
    others = [value for value in graph.outputs if value not in presents]
    if len(others) != 1:
        listed = ", ".join(f"'{value.name}'" for value in others) or "none"
        raise GraphError(f"the graph must have one output besides the caches, the logits; it has {listed}")
    return others[0]


def _check_inputs(graph: ir.Graph, evaluator: Evaluator, attentions: Sequence[Attention]) -> None:
    used = {value for attention in attentions for value in attention.past}
    if names.INPUT_IDS not in evaluator.roles.values():
        raise GraphError(f"the graph has no input '{names.INPUT_IDS}'; models that take embeddings cannot be rewritten")
    for value in graph.inputs:
        if value in evaluator.roles and (dimension(value, 0) not in (None, 1) or dimension(value, 1) is not None):
            raise GraphError(
                f"graph input '{value.name}' is of fixed size {list(value.shape)}; export it with dynamic shapes"
            )
        if value in evaluator.roles or value in used:
            continue
        if value in evaluator.caches:
            raise GraphError(
                f"graph input '{value.name}' is the past of no attention that was found ({len(attentions)} were); "
                "the model has a layer that cannot be rewritten"
            )
        raise GraphError(f"graph input '{value.name}' is not known; export the model without it")
    if used and len(used) != 2 * len(attentions):
        raise GraphError(f"{len(attentions)} attentions share {len(used)} past keys and values; each needs its own two")


def _rename_old(graph: ir.Graph, attentions: Sequence[Attention]) -> None:
    """Free the names that the new inputs and outputs take."""
    presents = [value for attention in attentions for value in attention.presents]
    for value in [*graph.inputs, *presents]:
        value.name = f"socket.old.{value.name}"


def _settle(model: ir.Model, evaluator: Evaluator, packed: PackedGraph, old_inputs: Sequence[ir.Value]) -> None:
    """Replace what the body still reads of the padded batch: sizes that are now one, and positions.

    Raises GraphError naming the first node that reads something else of it.
    """
    steps = _CACHED_STEPS if evaluator.caches else _UNCACHED_STEPS
    graph = model.graph
    while True:
        graph.sort()
        RemoveUnusedNodesPass()(model)
        tainted = reads_tokens_in_order(graph, old_inputs)
        if not tainted:
            return
        for value in [output for node in tainted for output in node.outputs]:
            replacement = _settled(value, evaluator, packed, steps)
            if replacement is not None:
                ir.convenience.replace_all_uses_with(value, replacement)
                break
        else:
            raise refuse_leftover(tainted[0])


def _settled(value: ir.Value, evaluator: Evaluator, packed: PackedGraph, steps: Sequence[Situation]) -> ir.Value | None:
    """A constant or the positions, if that is what the value is in every step."""
    if not value.uses() or (value.dtype is not None and value.dtype.is_floating_point() and not _is_count(value)):
        return None
    try:
        results = [arrays[0] for arrays in evaluator.run([value], steps)]
    except MismatchError:
        return None
    first = results[0]
    if all(r.shape == first.shape and np.array_equal(r, first) for r in results):
        return packed.make.constant(first)
    make, position = packed.make, packed.step[names.POSITION_IDS]
    if all(
        r.size == s.tokens and np.array_equal(r.reshape(-1), s.positions()[0])
        for r, s in zip(results, steps, strict=True)
    ):
        axis = max(range(first.ndim), key=lambda a: first.shape[a])
        shape = make.ints(*(-1 if a == axis else 1 for a in range(first.ndim)))
        kind = ir.DataType.from_numpy(first.dtype)
        return make("Reshape", make("Cast", position, to=int(kind)), shape)
    return None


def _is_count(value: ir.Value) -> bool:
    """Floats that can be positions; what is made of them further on is not worth computing."""
    return value.producer().op_type in ("Range", "Cast")


def _finish(model: ir.Model, opset: int) -> None:
    """The function body, the versions, and no shape left that names the padded batch's dimensions."""
    graph = model.graph
    ends = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value not in ends and value.shape is not None and not (rank(value) == 0 or value.shape.is_static()):
                value.shape = None
    graph.opset_imports[names.DOMAIN] = names.OPERATOR_VERSION
    body = ir.serde.deserialize_function(function_body(opset))
    model.functions[body.identifier()] = body
    model.ir_version = max(model.ir_version, 8)  # the first with functions
    graph.sort()
