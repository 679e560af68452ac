"""`SocketAttention` as a function of standard ONNX operators, so that any ONNX runtime can run the graph.

Only operators that mean the same in opsets 17 to 23 appear (reductions other than ReduceSum, Split and Pad do not), so
one body serves them all.  Shapes in the comments are those of `socket_trt.reference.operator`; everything is computed
in float32 whatever T is.
"""

# The body is ONNX in Python's clothes: onnxscript compiles it, Python never runs it, so its names follow ONNX.
# mypy: ignore-errors
from __future__ import annotations

import onnx
from onnxscript import opset17 as op
from onnxscript import script
from onnxscript.values import Opset

from socket_trt import names
from socket_trt.onnx import schema as _registered  # noqa: F401  (onnxscript looks the operator up)

_SOCKET = Opset(names.DOMAIN, names.OPERATOR_VERSION)

MIN_OPSET, MAX_OPSET = 17, 23


@script(_SOCKET, default_opset=op)
def SocketAttention(
    query,
    key,
    value,
    key_cache,
    value_cache,
    code_cache,
    norm_cache,
    page_table,
    past_length,
    query_start,
    planes,
    scale: float,
    temperature: float,
    sink: int,
    window: int,
    budget_tokens: int,
    budget_permille: int,
    min_length: int,
    selection: int,
    page_size: int,
    sliding_window: int = -1,
    softcap: float = 0.0,
    plugin_version: str = "1",
    plugin_namespace: str = "socket",
):
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    last_axis = op.Constant(value_ints=[-1])
    flat = op.Constant(value_ints=[-1])
    query_heads = op.Shape(query, start=1, end=2)
    kv_heads = op.Shape(key, start=1, end=2)
    head_size = op.Shape(query, start=3, end=4)
    tables = op.Shape(planes, start=0, end=1)
    rank = op.Shape(planes, start=1, end=2)
    group = op.Div(query_heads, kv_heads)
    page_tokens = op.Constant(value_int=page_size)
    table = op.Cast(page_table, to=7)
    past = op.Cast(past_length, to=7)
    start = op.Cast(query_start, to=7)
    sequences = op.Shape(past_length)
    total = op.Gather(start, sequences)  # tokens that are no padding, [1]

    # Codes: bits a code, codes a word, and the place values of both.
    code_bits = op.Where(
        op.LessOrEqual(rank, op.Constant(value_ints=[8])), op.Constant(value_ints=[8]), op.Constant(value_ints=[16])
    )
    per_word = op.Div(op.Constant(value_ints=[32]), code_bits)
    two = op.Constant(value_float=2.0)
    code_range = op.Cast(op.Pow(two, op.Cast(code_bits, to=1)), to=7)  # 2^bits, [1]
    word_places = op.Cast(
        op.Pow(op.Cast(code_range, to=11), op.Cast(op.Range(zero, op.Squeeze(per_word, axis0), one), to=11)), to=7
    )  # [per_word]
    plane_places = op.Cast(
        op.Pow(two, op.Cast(op.Sub(op.Sub(rank, axis1), op.Range(zero, op.Squeeze(rank, axis0), one)), to=1)), to=7
    )  # 2^(R-1) ... 1: the first plane is the most significant bit, [R]
    word_range = op.Constant(value_int=4294967296)

    # Where each token of the step goes: its row, its position, its page and its slot, [tokens].
    token = op.Range(zero, op.Squeeze(total, axis0), one)
    row_ends = op.Slice(start, op.Constant(value_ints=[1]), op.Constant(value_ints=[2147483647]), axis0)
    row = op.ReduceSum(
        op.Cast(op.LessOrEqual(op.Unsqueeze(row_ends, axis0), op.Unsqueeze(token, axis1)), to=7), axis1, keepdims=0
    )
    position = op.Add(op.Gather(past, row), op.Sub(token, op.Gather(start, row)))
    page = op.GatherND(
        table, op.Concat(op.Unsqueeze(row, axis1), op.Unsqueeze(op.Div(position, page_tokens), axis1), axis=1)
    )
    slot = op.Mod(position, page_tokens)

    # Cache slots of every (token, KV head): [tokens, Hkv, 3].
    head = op.Range(zero, op.Squeeze(kv_heads, axis0), one)
    token_heads = op.Concat(total, kv_heads, axis1, axis=0)
    page_index = op.Expand(op.Unsqueeze(page, op.Constant(value_ints=[1, 2])), token_heads)
    head_index = op.Expand(op.Unsqueeze(head, op.Constant(value_ints=[0, 2])), token_heads)
    slot_index = op.Expand(op.Unsqueeze(slot, op.Constant(value_ints=[1, 2])), token_heads)
    slots = op.Concat(page_index, head_index, slot_index, axis=2)

    # New keys, values and value norms.
    new_keys = op.Slice(op.Transpose(op.Squeeze(key, axis0), perm=[1, 0, 2]), axis0, total, axis0)  # [tokens, Hkv, D]
    new_values = op.Slice(op.Transpose(op.Squeeze(value, axis0), perm=[1, 0, 2]), axis0, total, axis0)
    wide_values = op.Cast(new_values, to=1)
    new_norms = op.CastLike(op.Sqrt(op.ReduceSum(op.Mul(wide_values, wide_values), last_axis, keepdims=0)), norm_cache)
    key_cache_out = op.ScatterND(key_cache, slots, new_keys)
    value_cache_out = op.ScatterND(value_cache, slots, new_values)
    norm_cache_out = op.ScatterND(norm_cache, slots, new_norms)

    # New codes, added into their words as the difference to what stands there: tokens that share a word do not clash.
    projection = op.Transpose(
        op.Cast(op.Reshape(planes, op.Concat(op.Mul(tables, rank), head_size, axis=0)), to=1), perm=[1, 0]
    )
    signs = op.GreaterOrEqual(op.MatMul(op.Cast(new_keys, to=1), projection), op.Constant(value_float=0.0))
    new_bits = op.Reshape(op.Cast(signs, to=7), op.Concat(total, kv_heads, tables, rank, axis=0))
    new_codes = op.ReduceSum(op.Mul(new_bits, plane_places), last_axis, keepdims=0)  # [tokens, Hkv, L]
    token_tables = op.Concat(total, kv_heads, tables, axis1, axis=0)
    word = op.Div(slot, per_word)
    word_slots = op.Concat(
        op.Expand(op.Unsqueeze(page, op.Constant(value_ints=[1, 2, 3])), token_tables),
        op.Expand(op.Unsqueeze(head, op.Constant(value_ints=[0, 2, 3])), token_tables),
        op.Expand(
            op.Unsqueeze(op.Range(zero, op.Squeeze(tables, axis0), one), op.Constant(value_ints=[0, 1, 3])),
            token_tables,
        ),
        op.Expand(op.Unsqueeze(word, op.Constant(value_ints=[1, 2, 3])), token_tables),
        axis=3,
    )  # [tokens, Hkv, L, 4]
    place = op.Unsqueeze(
        op.Gather(word_places, op.Mod(slot, per_word)), op.Constant(value_ints=[1, 2])
    )  # [tokens, 1, 1]
    old_words = op.Mod(op.Cast(op.GatherND(code_cache, word_slots), to=7), word_range)
    old_codes = op.Mod(op.Div(old_words, place), code_range)
    difference = op.Mul(op.Sub(new_codes, old_codes), place)
    half_range = op.Constant(value_int=2147483648)
    signed = op.Sub(op.Mod(op.Add(difference, half_range), word_range), half_range)
    code_cache_out = op.ScatterND(code_cache, word_slots, op.Cast(signed, to=6), reduction="add")

    # Corner bits of every bucket, for the bucket probabilities: float [R, 2^R].
    buckets = op.Range(zero, op.Squeeze(op.Cast(op.Pow(two, op.Cast(rank, to=1)), to=7), axis0), one)
    corner = op.Cast(
        op.Mod(op.Div(op.Unsqueeze(buckets, axis0), op.Unsqueeze(plane_places, axis1)), op.Constant(value_int=2)), to=1
    )
    other_corner = op.Sub(op.Constant(value_float=1.0), corner)

    sliding = op.Constant(value_int=sliding_window)
    cap = op.Constant(value_float=softcap)
    minus_one = op.Constant(value_float=-1.0)
    output = op.Slice(query, axis0, axis0, axis2)  # [1, Hq, 0, D], grown by each sequence
    for i in range(op.Squeeze(sequences, axis0)):
        # This sequence's tokens and what is cached of it.
        begin = op.Gather(start, op.Unsqueeze(i, axis0))
        end = op.Gather(start, op.Unsqueeze(op.Add(i, one), axis0))
        tokens = op.Sub(end, begin)
        before = op.Gather(past, op.Unsqueeze(i, axis0))
        length = op.Add(before, tokens)
        # A sequence without tokens still reads one page: a Reshape cannot infer an axis of an empty tensor.
        used_pages = op.Max(op.Div(op.Sub(op.Add(length, page_tokens), one), page_tokens), one)
        pages = op.Slice(op.Gather(table, i), axis0, used_pages, axis0)
        cached_shape = op.Concat(kv_heads, flat, head_size, axis=0)
        keys = op.Cast(op.Reshape(op.Transpose(op.Gather(key_cache_out, pages), perm=[1, 0, 2, 3]), cached_shape), to=1)
        keys = op.Slice(keys, axis0, length, axis1)  # [Hkv, T, D]
        values = op.Cast(
            op.Reshape(op.Transpose(op.Gather(value_cache_out, pages), perm=[1, 0, 2, 3]), cached_shape), to=1
        )
        values = op.Slice(values, axis0, length, axis1)
        q = op.Cast(op.Slice(op.Squeeze(query, axis0), begin, end, axis1), to=1)  # [Hq, n, D]

        # What causality and the sliding window let each query see: [n, T].
        t = op.Range(zero, op.Squeeze(length, axis0), one)
        query_position = op.Add(before, op.Range(zero, op.Squeeze(tokens, axis0), one))
        distance = op.Sub(op.Unsqueeze(query_position, axis1), op.Unsqueeze(t, axis0))
        causal = op.GreaterOrEqual(distance, zero)
        seen = op.And(causal, op.Or(op.Less(distance, sliding), op.LessOrEqual(sliding, zero)))

        selects = op.And(op.Equal(tokens, axis1), op.Greater(length, op.Constant(value_int=min_length)))
        if op.Squeeze(selects, axis0):
            # Bucket probabilities, log prod_r sigmoid(+-x_r), by two matrix products over the corners.
            root = op.Mul(op.Sqrt(op.Cast(head_size, to=1)), op.Constant(value_float=temperature))
            x = op.Div(op.Mul(two, op.Tanh(op.MatMul(op.Squeeze(q, axis1), projection))), root)
            x = op.Reshape(x, op.Concat(query_heads, tables, rank, axis=0))
            log_one = op.Neg(op.Softplus(op.Neg(x)))
            log_zero = op.Neg(op.Softplus(x))
            probability = op.Exp(op.Add(op.MatMul(log_one, corner), op.MatMul(log_zero, other_corner)))  # [Hq, L, 2^R]

            # Codes of the cached tokens, unpacked: [Hq, L, T].
            words = op.Mod(op.Cast(op.Gather(code_cache_out, pages), to=7), word_range)
            codes = op.Mod(
                op.Div(op.Unsqueeze(words, last_axis), word_places), code_range
            )  # [pages, Hkv, L, W, per_word]
            codes = op.Transpose(codes, perm=[1, 2, 0, 3, 4])
            codes = op.Reshape(codes, op.Concat(kv_heads, axis1, tables, flat, axis=0))
            codes = op.Slice(codes, axis0, length, op.Constant(value_ints=[3]))
            codes = op.Expand(codes, op.Concat(kv_heads, group, tables, length, axis=0))
            codes = op.Reshape(codes, op.Concat(query_heads, tables, length, axis=0))
            collisions = op.ReduceSum(op.GatherElements(probability, codes, axis=2), axis1, keepdims=0)  # [Hq, T]
            norms = op.Cast(op.Transpose(op.Gather(norm_cache_out, pages), perm=[1, 0, 2]), to=1)
            norms = op.Slice(op.Reshape(norms, op.Concat(kv_heads, axis1, flat, axis=0)), axis0, length, axis2)
            scores = op.Mul(op.Reshape(collisions, op.Concat(kv_heads, group, length, axis=0)), norms)  # [Hkv, G, T]
            shared = op.Expand(op.ReduceSum(scores, axis1, keepdims=1), op.Shape(scores))
            scores = op.Where(op.Equal(op.Constant(value_int=selection), one), shared, scores)
            scores = op.Reshape(scores, op.Concat(query_heads, length, axis=0))

            # Sink and window, and the best of the others; a score is never negative, so -1 marks what cannot be chosen.
            near = op.Or(op.Less(t, op.Constant(value_int=sink)), op.Less(distance, op.Constant(value_int=window)))
            fixed = op.And(seen, near)
            candidates = op.And(seen, op.Not(near))
            budget = op.Div(
                op.Add(op.Mul(length, op.Constant(value_int=budget_permille)), op.Constant(value_int=999)),
                op.Constant(value_int=1000),
            )
            budget = op.Min(op.Max(budget, op.Constant(value_int=budget_tokens)), length)
            scores = op.Where(candidates, scores, minus_one)
            best, index = op.TopK(scores, budget, axis=1)
            chosen = op.Cast(op.GreaterOrEqual(best, op.Constant(value_float=0.0)), to=1)
            chosen = op.ScatterElements(op.Mul(scores, op.Constant(value_float=0.0)), index, chosen, axis=1)
            mask = op.Unsqueeze(op.Or(fixed, op.Greater(chosen, op.Constant(value_float=0.5))), axis1)  # [Hq, 1, T]
        else:
            mask = op.Expand(op.Unsqueeze(seen, axis0), op.Concat(query_heads, tokens, length, axis=0))

        # Exact attention over the set; allowzero because a sequence may have no token in the step.
        grouped = op.Reshape(q, op.Concat(kv_heads, op.Mul(group, tokens), head_size, axis=0), allowzero=1)
        logits = op.Mul(op.MatMul(grouped, op.Transpose(keys, perm=[0, 2, 1])), op.Constant(value_float=scale))
        capped = op.Mul(op.Tanh(op.Div(logits, cap)), cap)
        logits = op.Where(op.Greater(cap, op.Constant(value_float=0.0)), capped, logits)
        logits = op.Reshape(logits, op.Concat(query_heads, tokens, length, axis=0), allowzero=1)
        weights = op.Softmax(op.Where(mask, logits, op.Constant(value_float=-1e30)), axis=-1)
        weights = op.Reshape(weights, op.Concat(kv_heads, op.Mul(group, tokens), length, axis=0), allowzero=1)
        attended = op.Reshape(
            op.MatMul(weights, values), op.Concat(axis1, query_heads, tokens, head_size, axis=0), allowzero=1
        )
        output = op.Concat(output, op.CastLike(attended, query), axis=2)

    # Padding tokens get zeros.
    padding = op.Slice(query, total, op.Constant(value_ints=[2147483647]), axis2)
    padding = op.CastLike(op.ConstantOfShape(op.Shape(padding)), query)
    output = op.Concat(output, padding, axis=2)
    return output, key_cache_out, value_cache_out, code_cache_out, norm_cache_out


def function_body(opset: int) -> onnx.FunctionProto:
    """The function for a model of ONNX opset `opset` (17 to 23); runtimes want both to name the same opset."""
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ValueError(f"the function body is written for opsets {MIN_OPSET} to {MAX_OPSET}, not {opset}")
    function = SocketAttention.to_function_proto()
    for entry in function.opset_import:
        if entry.domain == "":
            entry.version = opset
    return function
