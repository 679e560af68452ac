# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
"""Attention of decode queries: a part of the tokens for each program, combined by the last of them or by combine.cu.

Sparse programs read the cache slots that selection listed; dense programs read whole tiles of pages.  The query heads
that share their tokens (a KV head's group, or one head where each selects for itself) are the rows of one 16-row
product, so that every token is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .common import LOG2_E, Config, Kernel, Variant, accumulate, capped, page_of

ITEM_DENSE = tl.constexpr(1)  # ItemMode in arguments.h
ITEM_SPARSE = tl.constexpr(2)
MAX_SPLITS = tl.constexpr(64)  # kMaxSplits in arguments.h


@triton.jit
def decode_attention(
    query,
    key_cache,
    value_cache,
    page_table,
    past_length,
    query_start,
    items,
    slots,
    listed,
    partial_output,
    partial_stats,
    arrived,
    output,
    scale,
    softcap,
    sliding_window,
    min_length,
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
    COMBINE: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """Grid: parts of the tokens, sets of heads that share them, items.

    query [Hq, N, D]; key_cache, value_cache [P, Hkv, page_size, D]; page_table, past_length and query_start as the
    operator's; min_length too, or the largest integer where no sequence is sparse;
    items int32 [items, 4] (row, token, length, mode);
    slots int32 [items, sets, list_stride]; listed int32 [items, sets], their number;
    partial_output [items, Hq, split_stride, D]; partial_stats [items, Hq, split_stride, 2].
    COMBINE (only where every head has its own tokens): the last program of a head combines its parts, counting in
    arrived int32 [items, sets], and writes output [Hq, N, D].
    OVERLAPPED: the kernel may begin before those that it depends on have ended.  A dense program waits for them as late
    as it can: it finds its item by itself where that is plain, and of the cache only this step's token is not there yet.
    """
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    head_set = tl.program_id(1)
    item = tl.program_id(2)
    waits_late: tl.constexpr = OVERLAPPED and not SPARSE
    plain = False
    if waits_late:  # the sequence of the item's number has one token, of that number
        plain = (tl.load(query_start + item) == item) & (tl.load(query_start + item + 1) == item + 1)
    if plain:
        row, token = item, item
        most = pages_per_sequence << page_shift
        length = tl.minimum(tl.minimum(tl.maximum(tl.load(past_length + item), 0), most) + 1, most)
        mode = tl.where(length > min_length, ITEM_SPARSE, ITEM_DENSE)
    else:
        if OVERLAPPED:
            gdc_wait()
        row, token = tl.load(items + item * 4), tl.load(items + item * 4 + 1)
        length, mode = tl.load(items + item * 4 + 2), tl.load(items + item * 4 + 3)
    if mode != (ITEM_SPARSE if SPARSE else ITEM_DENSE):
        if OVERLAPPED:
            gdc_wait()  # who waits for this kernel's end relies on that of those before it, too
        return
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
    if waits_late and end == length:  # this step's token is in this part
        gdc_wait()

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
            slot = tl.where((slot >= 0) & (slot < (pages << page_shift)), slot, 0)
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

    if waits_late:
        gdc_wait()
    part = (item.to(tl.int64) * query_heads + head) * split_stride + split
    tl.store(partial_stats + part * 2, maximum, mask=exists)
    tl.store(partial_stats + part * 2 + 1, weights, mask=exists)
    written = exists[:, None] & (d[None, :] < HEAD_SIZE) & (begin < end)
    tl.store(partial_output + part[:, None] * HEAD_SIZE + d[None, :], sums, mask=written)
    if COMBINE:
        tl.debug_barrier()  # all of this program's parts are written before it counts itself
        if tl.atomic_add(arrived + item * tl.num_programs(1) + head_set, 1, sem="acq_rel") == splits - 1:
            first_part = (item.to(tl.int64) * query_heads + head_set) * split_stride
            combined = _combine(partial_output, partial_stats, first_part, splits, HEAD_SIZE, BLOCK_D)
            to = (head_set.to(tl.int64) * tokens + token) * HEAD_SIZE + d
            tl.store(output + to, combined.to(output.dtype.element_ty), mask=d < HEAD_SIZE)


@triton.jit
def _combine(partial_output, partial_stats, first_part, splits, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The softmax average of one head's parts; they come from other multiprocessors, past this one's cache."""
    d = tl.arange(0, BLOCK_D)
    every = tl.arange(0, MAX_SPLITS)
    maxima_at = partial_stats + (first_part + every) * 2
    maximum = tl.max(tl.load(maxima_at, mask=every < splits, other=float("-inf"), cache_modifier=".cg"), 0)
    total = tl.sum(tl.zeros([8], tl.float32), 0)
    combined = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, 8):
        split = start + tl.arange(0, 8)
        part = first_part + split
        exists = split < splits
        maxima = tl.load(partial_stats + part * 2, mask=exists, other=float("-inf"), cache_modifier=".cg")
        weights = tl.load(partial_stats + part * 2 + 1, mask=exists, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partial_output + part[:, None] * HEAD_SIZE + d[None, :],
            mask=exists[:, None] & (d[None, :] < HEAD_SIZE),
            other=0.0,
            cache_modifier=".cg",
        )
        factor = tl.where(weights > 0, tl.exp2(maxima - maximum), 0.0)
        total += tl.sum(factor * weights, 0)
        combined += tl.sum(tl.where((weights > 0)[:, None], values, 0.0) * factor[:, None], 0)
    return tl.where(total > 0, combined / total, 0.0)


def variants(architecture: int, head_size: int) -> Iterable[Variant]:
    """Sparse, where each head has its own tokens and where heads share them; dense over tiles of 64 positions, and of 16 where a page is shorter than that."""

    def configs(sparse: bool, block: int, combine: bool = False) -> tuple[Config, ...]:
        constants = {"SPARSE": sparse, "HEAD_SIZE": head_size, "BLOCK_D": triton.next_power_of_2(head_size)}
        constants |= {"COMBINE": combine, "OVERLAPPED": architecture >= 90}
        return tuple(
            Config({**constants, "BLOCK_N": n}, 4, stages)
            for n in (block, block // 2)
            if n >= 16
            for stages in (5, 4, 3, 1)  # 5 keep two tiles, as loads wait for page numbers
        )

    yield Variant("decode_sparse", configs(True, 64))
    yield Variant("decode_sparse_alone", configs(True, 64, combine=True))
    yield Variant("decode_dense_64", configs(False, 64))
    yield Variant("decode_dense_16", configs(False, 16))


KERNEL = Kernel(
    decode_attention,
    {
        "query": "*T",
        "key_cache": "*T",
        "value_cache": "*T",
        "page_table": "*i32",
        "past_length": "*i32",
        "query_start": "*i32",
        "items": "*i32",
        "slots": "*i32",
        "listed": "*i32",
        "partial_output": "*fp32",
        "partial_stats": "*fp32",
        "arrived": "*i32",
        "output": "*T",
        "scale": "fp32",
        "softcap": "fp32",
        "sliding_window": "i32",
        "min_length": "i32",
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
