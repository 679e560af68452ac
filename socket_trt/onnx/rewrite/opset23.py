"""ai.onnx `Attention` of opset 23, in the forms torch.onnx and hand-made graphs give it.

K and V may have been repeated to the query's heads (repeat_kv) and concatenated with the past before the node; both are
undone, so that the operator gets the step's own keys and values.
"""

from __future__ import annotations

import onnx_ir as ir

from socket_trt.onnx.rewrite.found import Attention, AttentionPattern
from socket_trt.onnx.rewrite.graph import (
    MismatchError,
    constant,
    dimension,
    input_at,
    integers,
    is_read,
    output_at,
    producer,
    rank,
)
from socket_trt.onnx.rewrite.mask import MaskReader

_MASK, _PAST_KEY, _PAST_VALUE = 3, 4, 5
_ATTRIBUTES = {
    "is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap", "softmax_precision",
}  # fmt: skip


class OnnxAttention(AttentionPattern):
    """Four-dimensional [B, H, S, D] or three-dimensional [B, S, H * D] inputs; K and V repeated or of fewer heads."""

    domain = ""
    op_type = "Attention"

    def match(self, node: ir.Node, masks: MaskReader) -> Attention:
        unknown = sorted(set(node.attributes) - _ATTRIBUTES)
        if unknown:
            raise MismatchError(f"attribute {unknown[0]} is not supported")
        if is_read(output_at(node, 3)):
            raise MismatchError("its qk_matmul_output is used")
        query, key, value = node.inputs[:3]
        dims = rank(query)
        if dims not in (3, 4):
            raise MismatchError("the rank of its query is not known; run ONNX shape inference on the model first")
        heads_first = dims == 4
        key, repeat, past_key, present_key = _step_values(key, heads_first)
        value, value_repeat, past_value, present_value = _step_values(value, heads_first)
        if repeat != value_repeat or (past_key is None) != (past_value is None):
            raise MismatchError("key and value are made differently")
        past = [v for v in (past_key, past_value) if v is not None]
        presents = [v for v in (present_key, present_value) if v is not None]
        inner = [v for v in (input_at(node, _PAST_KEY), input_at(node, _PAST_VALUE)) if v is not None]
        if inner:
            if past or len(inner) != 2 or not all(v.is_graph_input() for v in inner):
                raise MismatchError("its past_key and past_value are not graph inputs of their own")
            past = inner
            presents = [v for v in (output_at(node, 1), output_at(node, 2)) if v is not None]

        query_heads, kv_heads, head_size = _sizes(node, query, key, past, heads_first)
        if query_heads % kv_heads or repeat not in (1, query_heads // kv_heads):
            raise MismatchError(
                f"{query_heads} query heads do not divide among {kv_heads} KV heads repeated {repeat} times"
            )
        dtype = query.dtype or key.dtype
        if dtype is None:
            raise MismatchError("the type of its query is not known; run ONNX shape inference on the model first")
        return Attention(
            node=node,
            query=query,
            key=key,
            value=value,
            heads_first=heads_first,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_size=head_size,
            dtype=dtype,
            scale=node.attributes.get_float("scale", None) or head_size**-0.5,
            sliding_window=_window(node, masks, cached_outside=bool(past) and not inner),
            softcap=node.attributes.get_float("softcap", 0.0),
            rotary=None,
            past=tuple(past),
            presents=tuple(presents),
        )


def _window(node: ir.Node, masks: MaskReader, cached_outside: bool) -> int:
    """The sliding window that is_causal and the mask together leave."""
    causal = bool(node.attributes.get_int("is_causal", 0))
    mask = input_at(node, _MASK)
    if causal and cached_outside:
        # ONNX counts from the first key then, which lies in the past: right only while nothing is cached.
        raise MismatchError(
            "is_causal=1 over a cache concatenated outside the node masks the wrong tokens; export with an attention mask"
        )
    if mask is None:
        if not causal:
            raise MismatchError("it has neither a mask nor is_causal=1: it is not causal")
        return -1
    return masks.window(mask, causal)


def _step_values(value: ir.Value, heads_first: bool) -> tuple[ir.Value, int, ir.Value | None, ir.Value | None]:
    """A key or value input as (the step's own, times its heads were repeated, past input, what becomes the present)."""
    repeated, repeat = _before_repeat(value) if heads_first else (value, 1)
    concat = producer(repeated, "Concat")
    if concat is None or not concat.inputs[0].is_graph_input():
        if repeat == 1 and (whole := _repeat_without_proof(value)) is not None:
            raise MismatchError(f"'{value.name}' is made by {whole.op_type} in a way that is not known to be repeat_kv")
        return repeated, repeat, None, None
    tokens_axes = (2, -2) if heads_first else (1, -2)
    if len(concat.inputs) != 2 or concat.attributes.get_int("axis", 0) not in tokens_axes:
        raise MismatchError(f"'{repeated.name}' is not the past followed by the step's tokens")
    return concat.inputs[1], repeat, concat.inputs[0], repeated


def _before_repeat(value: ir.Value) -> tuple[ir.Value, int]:
    """Undo repeat_kv, [B, Hkv, T, D] to [B, Hkv * repeat, T, D] with a head's copies next to one another."""
    gather = producer(value, "Gather")
    if gather is not None and gather.attributes.get_int("axis", 0) in (1, -3):
        heads, order = dimension(gather.inputs[0], 1), integers(gather.inputs[1])
        if heads and order and order == [h for h in range(heads) for _ in range(len(order) // heads)]:
            return gather.inputs[0], len(order) // heads
        return value, 1
    reshape = producer(value, "Reshape")
    if reshape is None:
        return value, 1
    copies = producer(reshape.inputs[0], "Expand") or producer(reshape.inputs[0], "Tile")
    if copies is None:
        return value, 1
    if copies.op_type == "Tile":
        times = integers(copies.inputs[1])
        if times is None or len(times) != 5 or any(n != 1 for axis, n in enumerate(times) if axis != 2):
            return value, 1  # copies of whole groups of heads
    inserted = copies.inputs[0]
    unsqueeze = producer(inserted, "Unsqueeze") or producer(inserted, "Reshape")
    if unsqueeze is None:
        return value, 1
    source = unsqueeze.inputs[0]
    axes = integers(unsqueeze.inputs[1]) if unsqueeze.op_type == "Unsqueeze" else None
    heads, repeated = dimension(source, 1), dimension(value, 1)
    # Only a new axis right behind the heads keeps a head's copies together.
    behind_heads = axes in ([2], [-3]) or (axes is None and rank(inserted) == 5 and dimension(inserted, 2) == 1)
    if not behind_heads or rank(source) != 4 or not heads or not repeated or repeated % heads:
        return value, 1
    return source, repeated // heads


def _repeat_without_proof(value: ir.Value) -> ir.Node | None:
    """The node that seems to change the cached tokens in a way `_before_repeat` did not understand."""
    pending, steps = [value], 0
    while pending and steps < 8:
        steps += 1
        node = pending.pop(0).producer()
        if node is None:
            continue
        if node.op_type == "Concat" and node.inputs[0] is not None and node.inputs[0].is_graph_input():
            return value.producer()
        if node.op_type in (
            "Reshape",
            "Expand",
            "Tile",
            "Unsqueeze",
            "Transpose",
            "Cast",
            "Slice",
            "Gather",
            "Identity",
        ):
            pending.append(node.inputs[0])
        elif node.op_type == "Concat":
            pending.extend(v for v in node.inputs if v is not None)
    return None


def _sizes(
    node: ir.Node, query: ir.Value, key: ir.Value, past: list[ir.Value], heads_first: bool
) -> tuple[int, int, int]:
    """Hq, Hkv and D, from whichever of attributes and shapes states them."""
    query_heads = node.attributes.get_int("q_num_heads", 0) or (dimension(query, 1) if heads_first else None)
    kv_heads = node.attributes.get_int("kv_num_heads", 0) or (dimension(key, 1) if heads_first else None)
    if not kv_heads and past:
        kv_heads = dimension(past[0], 1)
    if not query_heads or not kv_heads:
        raise MismatchError("its numbers of heads are not known; run ONNX shape inference on the model first")
    width = dimension(query, -1)
    head_size = width if heads_first or width is None else width // query_heads
    if head_size is None and past:
        head_size = dimension(past[0], 3)
    if not head_size:
        raise MismatchError("its head size is not known; run ONNX shape inference on the model first")
    if constant(key) is not None:
        raise MismatchError("its key is a constant")
    return query_heads, kv_heads, head_size
