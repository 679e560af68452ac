# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
"""Dense causal attention of prefill chunks over the paged cache: a tile of 128 queries of one head for each program."""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl

from .common import LOG2_E, Config, Kernel, Variant, accumulate, capped, page_of

BLOCK_M = 128  # kPrefillRows in arguments.h


@triton.jit
def _attend_range(
    weights,
    sums,
    maximum,
    q,
    key_cache,
    value_cache,
    page_table,
    row,
    kv_head,
    position,
    begin,
    end,
    scale,
    softcap,
    sliding_window,
    kv_heads,
    pages,
    pages_per_sequence,
    page_shift,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Queries at `position` attend to the keys [begin, end); without MASKED all of them are visible to every query."""
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        page = page_of(page_table, start, row, pages, pages_per_sequence, page_shift)
        first = ((page.to(tl.int64) * kv_heads + kv_head) << page_shift) + (start & ((1 << page_shift) - 1))
        at = first * HEAD_SIZE + n[:, None] * HEAD_SIZE + d[None, :]
        if MASKED:
            present = (start + n < end)[:, None] & (d[None, :] < HEAD_SIZE)
            k = tl.load(key_cache + at, mask=present, other=0.0)
            v = tl.load(value_cache + at, mask=present, other=0.0)
        elif BLOCK_D != HEAD_SIZE:
            k = tl.load(key_cache + at, mask=d[None, :] < HEAD_SIZE, other=0.0)
            v = tl.load(value_cache + at, mask=d[None, :] < HEAD_SIZE, other=0.0)
        else:
            k = tl.load(key_cache + at)
            v = tl.load(value_cache + at)
        scores = tl.dot(q, tl.trans(k))
        scores = capped(scores * scale, softcap) * LOG2_E if CAPPED else scores * (scale * LOG2_E)
        if MASKED:
            distance = position[:, None] - (start + n)[None, :]
            seen = distance >= 0
            if sliding_window > 0:
                seen = seen & (distance < sliding_window)
            scores = tl.where(seen, scores, float("-inf"))
        weights, sums, maximum = accumulate(weights, v, sums, maximum, scores)
    return weights, sums, maximum


@triton.jit
def prefill_attention(
    query,
    key_cache,
    value_cache,
    page_table,
    tiles,
    output,
    scale,
    softcap,
    sliding_window,
    tokens,
    query_heads,
    kv_heads,
    pages,
    pages_per_sequence,
    page_shift,
    CAPPED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: query heads, tiles (so that the heads of one KV head, which read the same keys, run together).

    query, output [Hq, N, D]; key_cache, value_cache [P, Hkv, page_size, D];
    tiles int32 [tiles, 4] (row, first token, tokens, position of the first token).
    """
    head = tl.program_id(0)
    tile = tl.program_id(1)
    count = tl.load(tiles + tile * 4 + 2)
    if count == 0:
        return
    row = tl.load(tiles + tile * 4)
    token = tl.load(tiles + tile * 4 + 1)
    first = tl.load(tiles + tile * 4 + 3)
    kv_head = head // (query_heads // kv_heads)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    exists = (m < count)[:, None] & (d[None, :] < HEAD_SIZE)
    at = (head.to(tl.int64) * tokens + token + m)[:, None] * HEAD_SIZE + d[None, :]
    q = tl.load(query + at, mask=exists, other=0.0)
    position = first + m
    end = first + count
    # Keys that every query of the tile sees need no mask.
    begin = 0
    masked_begin = (first + 1) // BLOCK_N * BLOCK_N
    if sliding_window > 0:
        begin = tl.maximum(first - sliding_window + 1, 0) // BLOCK_N * BLOCK_N
        masked_begin = begin

    weights = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weights, sums, maximum = _attend_range(
        weights, sums, maximum, q, key_cache, value_cache, page_table, row, kv_head, position, begin, masked_begin,
        scale, softcap, sliding_window, kv_heads, pages, pages_per_sequence, page_shift,
        False, CAPPED, HEAD_SIZE, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    weights, sums, maximum = _attend_range(
        weights, sums, maximum, q, key_cache, value_cache, page_table, row, kv_head, position, masked_begin, end,
        scale, softcap, sliding_window, kv_heads, pages, pages_per_sequence, page_shift,
        True, CAPPED, HEAD_SIZE, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    tl.store(output + at, (sums / weights[:, None]).to(output.dtype.element_ty), mask=exists)


def variants(architecture: int, head_size: int) -> Iterable[Variant]:
    """Tiles of 64 keys, and of 16 where a page is shorter than that; with and without a cap on the scores."""

    def configs(cap: bool, *blocks: int) -> tuple[Config, ...]:
        constants = {"CAPPED": cap, "HEAD_SIZE": head_size, "BLOCK_D": triton.next_power_of_2(head_size)}
        constants |= {"BLOCK_M": BLOCK_M}
        return tuple(
            Config(constants | {"BLOCK_N": n}, 8, stages)
            for n in blocks
            for stages in (5, 4, 3, 1)  # the page numbers' load takes one
        )

    for cap, suffix in ((False, ""), (True, "_capped")):
        yield Variant(f"prefill_64{suffix}", configs(cap, 64, 32, 16))
        yield Variant(f"prefill_16{suffix}", configs(cap, 16))


KERNEL = Kernel(
    prefill_attention,
    {
        "query": "*T",
        "key_cache": "*T",
        "value_cache": "*T",
        "page_table": "*i32",
        "tiles": "*i32",
        "output": "*T",
        "scale": "fp32",
        "softcap": "fp32",
        "sliding_window": "i32",
        "tokens": "i32",
        "query_heads": "i32",
        "kv_heads": "i32",
        "pages": "i32",
        "pages_per_sequence": "i32",
        "page_shift": "i32",
    },
    variants,
)
