"""`com.microsoft::GroupQueryAttention` as onnxruntime-genai's model builder writes it.

The node is causal by definition; its seqlens_k and total_sequence_length, computed from the attention mask, are
replaced by past_length and query_start.
"""

from __future__ import annotations

from typing import NoReturn

import onnx_ir as ir

from socket_trt import names
from socket_trt.onnx.rewrite.found import Attention, AttentionPattern, Rotary
from socket_trt.onnx.rewrite.graph import (
    MICROSOFT,
    MismatchError,
    dimension,
    input_at,
    is_read,
    output_at,
)
from socket_trt.onnx.rewrite.mask import MaskReader

_INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids",
)  # fmt: skip
_LATER_INPUTS = ("attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight")
_ATTRIBUTES = {"num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "rotary_interleaved"}
# Attributes of other variants, and the values with which they change nothing.  A cache that holds only the window
# (sliding_window_cache) attends as any other with that window.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "smooth_softmax": (0, -1),
    "qk_output": (0, -1),
    "k_quant_type": ("NONE", ""),
    "v_quant_type": ("NONE", ""),
    "kv_cache_bit_width": (0,),
    "sliding_window_cache": (0, 1),
}


class GroupQueryAttention(AttentionPattern):
    """Packed [B, S, (Hq + 2 Hkv) * D] or separate query, key, value; rotary embedding inside or before the node."""

    domain = MICROSOFT
    op_type = "GroupQueryAttention"

    def match(self, node: ir.Node, masks: MaskReader) -> Attention:
        _check_variant(node)
        inputs = {name: input_at(node, index) for index, name in enumerate(_INPUTS)}
        query, key, value = node.inputs[:3]
        if (key is None) != (value is None):
            raise MismatchError("it has a key without a value")
        query_heads, kv_heads = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
        if query_heads <= 0 or kv_heads <= 0 or query_heads % kv_heads:
            raise MismatchError(f"num_heads {query_heads} does not divide among kv_num_heads {kv_heads}")
        past = [v for v in (inputs["past_key"], inputs["past_value"]) if v is not None]
        if len(past) == 1 or not all(v.is_graph_input() for v in past):
            raise MismatchError("its past_key and past_value are not graph inputs")
        dtype = query.dtype or (past[0].dtype if past else None)
        if past and dtype is not None and past[0].dtype not in (None, dtype):
            raise MismatchError(
                f"its cache is {past[0].dtype}, not {dtype} as its query: quantised caches are not supported"
            )
        if dtype is None:
            raise MismatchError("the type of its query is not known; run ONNX shape inference on the model first")
        head_size = _head_size(query, key is None, query_heads, kv_heads, past)
        window = node.attributes.get_int("local_window_size", -1)
        return Attention(
            node=node,
            query=query,
            key=key,
            value=value,
            heads_first=False,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_size=head_size,
            dtype=dtype,
            scale=node.attributes.get_float("scale", 0.0) or head_size**-0.5,
            sliding_window=window if window > 0 else -1,
            softcap=max(node.attributes.get_float("softcap", 0.0), 0.0),
            rotary=_rotary(node, inputs),
            past=tuple(past),
            presents=tuple(v for v in (output_at(node, 1), output_at(node, 2)) if v is not None),
        )


def _check_variant(node: ir.Node) -> None:
    for name, attribute in node.attributes.items():
        if name not in _ATTRIBUTES and attribute.value not in _NEUTRAL.get(name, ()):
            raise MismatchError(f"attribute {name}={attribute.value!r} is not supported")
    for index in range(len(_INPUTS), len(node.inputs)):
        if node.inputs[index] is not None:
            later = index - len(_INPUTS)
            name = _LATER_INPUTS[later] if later < len(_LATER_INPUTS) else f"number {index}"
            raise MismatchError(f"input {name} is not supported")
    if is_read(output_at(node, 3)):
        raise MismatchError("its output_qk is used")


def _head_size(query: ir.Value, packed: bool, query_heads: int, kv_heads: int, past: list[ir.Value]) -> int:
    """D: of the cache, or of the projection where the cache does not say (the builder writes a symbol)."""
    if past and (size := dimension(past[0], 3)):
        return size
    width, heads = dimension(query, -1), query_heads + 2 * kv_heads if packed else query_heads
    if width is None or width % heads:
        raise MismatchError("its head size is not known; run ONNX shape inference on the model first")
    return width // heads


def _rotary(node: ir.Node, inputs: dict[str, ir.Value | None]) -> Rotary | None:
    if not node.attributes.get_int("do_rotary", 0):
        return None
    cos, sin = inputs["cos_cache"], inputs["sin_cache"]
    if cos is None or sin is None:
        raise MismatchError("do_rotary=1 without cos_cache and sin_cache")
    for table in (cos, sin):
        if not table.is_initializer():
            _refuse_table(table)
    position = inputs["position_ids"]
    while position is not None and not position.is_graph_input() and position.producer() is not None:
        if position.producer().op_type not in ("Cast", "Identity", "Reshape"):
            break
        position = position.producer().inputs[0]
    if position is not None and position.name != names.POSITION_IDS:
        raise MismatchError(f"its positions come from '{position.name}', not from the graph input {names.POSITION_IDS}")
    return Rotary(cos, sin, bool(node.attributes.get_int("rotary_interleaved", 0)))


def _refuse_table(table: ir.Value) -> NoReturn:
    maker = table.producer()
    how = f"computed by {maker.op_type}" if maker is not None else "a graph input"
    raise MismatchError(
        f"its table '{table.name}' is {how}; a rope that changes with the length (longrope) has no fixed table: "
        "build the model with one"
    )
