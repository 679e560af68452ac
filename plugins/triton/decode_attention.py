# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
"""Attention of decode queries: a part of the tokens for each program, combined by combine.cu.

Sparse programs read the cache slots that selection listed; dense programs read whole tiles of pages.  The query heads
that share their tokens (a KV head's group, or one head where each selects for itself) are the rows of one 16-row
product, so that every token is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl

from .common import LOG2_E, Config, Kernel, Variant, accumulate, capped, page_of

ITEM_DENSE = tl.constexpr(1)  # ItemMode in arguments.h
ITEM_SPARSE = tl.constexpr(2)


@triton.jit
def decode_attention(
    query,
    key_cache,
    value_cache,
    page_table,
    items,
    slots,
    listed,
    partial_output,
    partial_stats,
    scale,
    softcap,
    sliding_window,
    tokens,
    query_heads,
    kv_heads,
    heads_together,
    pages,
    pages_per_sequence,
    page_shift,
    list_stride,
    split_stride,
    SPARSE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: parts of the tokens, sets of heads that share them, items.

    query [Hq, N, D]; key_cache, value_cache [P, Hkv, page_size, D]; items int32 [items, 4] (row, token, length, mode);
    slots int32 [items, sets, list_stride]; listed int32 [items, sets], their number;
    partial_output [items, Hq, split_stride, D]; partial_stats [items, Hq, split_stride, 2].
    """
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    head_set = tl.program_id(1)
    item = tl.program_id(2)
    mode = tl.load(items + item * 4 + 3)
    if mode != (ITEM_SPARSE if SPARSE else ITEM_DENSE):
        return
    row = tl.load(items + item * 4)
    token = tl.load(items + item * 4 + 1)
    length = tl.load(items + item * 4 + 2)
    kv_head = head_set * heads_together // (query_heads // kv_heads)
    place_mask = (1 << page_shift) - 1

    # The tokens of this program: [begin, end) of the list, or of the positions.
    if SPARSE:
        list_index = item.to(tl.int64) * tl.num_programs(1) + head_set
        end = tl.load(listed + list_index)
        begin = 0
        first = 0
        share = tl.cdiv(end, splits)
    else:
        end = length
        first = 0
        if sliding_window > 0:
            first = tl.maximum(length - sliding_window, 0)
        begin = first // BLOCK_N * BLOCK_N
        share = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_N) * BLOCK_N  # tiles stay inside pages
    begin += split * share
    end = tl.minimum(end, begin + share)

    heads = tl.arange(0, 16)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    head = head_set * heads_together + heads
    exists = heads < heads_together
    q_at = (head.to(tl.int64) * tokens + token)[:, None] * HEAD_SIZE + d[None, :]
    q = tl.load(query + q_at, mask=exists[:, None] & (d[None, :] < HEAD_SIZE), other=0.0)

    weights = tl.zeros([16], tl.float32)
    maximum = tl.full([16], float("-inf"), tl.float32)
    sums = tl.zeros([16, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        valid = start + n < end
        if SPARSE:
            slot = tl.load(slots + list_index * list_stride + start + n, mask=valid, other=0)
            page = slot >> page_shift
            place = slot & place_mask
        else:
            valid = valid & (start + n >= first)
            page = page_of(page_table, start, row, pages, pages_per_sequence, page_shift)
            place = (start & place_mask) + n
        at = (((page.to(tl.int64) * kv_heads + kv_head) << page_shift) + place)[:, None] * HEAD_SIZE + d[None, :]
        present = valid[:, None] & (d[None, :] < HEAD_SIZE)
        k = tl.load(key_cache + at, mask=present, other=0.0)
        v = tl.load(value_cache + at, mask=present, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        if softcap > 0:
            scores = capped(scores, softcap)
        scores = tl.where(valid[None, :], scores * LOG2_E, float("-inf"))
        weights, sums, maximum = accumulate(weights, v, sums, maximum, scores)

    part = (item.to(tl.int64) * query_heads + head) * split_stride + split
    tl.store(partial_stats + part * 2, maximum, mask=exists)
    tl.store(partial_stats + part * 2 + 1, weights, mask=exists)
    written = exists[:, None] & (d[None, :] < HEAD_SIZE) & (begin < end)
    tl.store(partial_output + part[:, None] * HEAD_SIZE + d[None, :], sums, mask=written)


def variants(architecture: int, head_size: int) -> Iterable[Variant]:
    """Sparse; dense over tiles of 64 positions, and of 16 where a page is shorter than that."""

    def configs(sparse: bool, block: int) -> tuple[Config, ...]:
        constants = {"SPARSE": sparse, "HEAD_SIZE": head_size, "BLOCK_D": triton.next_power_of_2(head_size)}
        return tuple(
            Config({**constants, "BLOCK_N": n}, 4, stages)
            for n in (block, block // 2)
            if n >= 16
            for stages in (5, 4, 3, 1)  # the page numbers' load takes one, so that 5 keep three tiles
        )

    yield Variant("decode_sparse", configs(True, 64))
    yield Variant("decode_dense_64", configs(False, 64))
    yield Variant("decode_dense_16", configs(False, 16))


KERNEL = Kernel(
    decode_attention,
    {
        "query": "*T",
        "key_cache": "*T",
        "value_cache": "*T",
        "page_table": "*i32",
        "items": "*i32",
        "slots": "*i32",
        "listed": "*i32",
        "partial_output": "*fp32",
        "partial_stats": "*fp32",
        "scale": "fp32",
        "softcap": "fp32",
        "sliding_window": "i32",
        "tokens": "i32",
        "query_heads": "i32",
        "kv_heads": "i32",
        "heads_together": "i32",
        "pages": "i32",
        "pages_per_sequence": "i32",
        "page_shift": "i32",
        "list_stride": "i32",
        "split_stride": "i32",
    },
    variants,
)
