"""The whole `SocketAttention` operator on packed tokens and a paged cache.

Shapes: N tokens in this step, B sequences, Hq/Hkv query/KV heads, D head size, P pages in the pool, M pages a sequence
at most, L tables, R planes, W = page_size * bits / 32 words, bits = 8 up to 8 planes, else 16.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes, code_bits
from socket_trt.names import OPERATOR_INPUTS
from socket_trt.reference.hashing import key_codes, pack_codes, unpack_codes
from socket_trt.reference.selection import attended_set


class OperatorOutputs(NamedTuple):
    output: Tensor
    key_cache: Tensor
    value_cache: Tensor
    code_cache: Tensor
    norm_cache: Tensor


class Sequence(NamedTuple):
    """The cached tokens of one sequence in order: keys, values [Hkv, T, D], codes [Hkv, L, T], norms [Hkv, T]."""

    keys: Tensor
    values: Tensor
    codes: Tensor
    norms: Tensor


def socket_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor,
    page_table: Tensor,
    past_length: Tensor,
    query_start: Tensor,
    planes: Tensor,
    attributes: OperatorAttributes,
    compute_dtype: torch.dtype = torch.float32,
) -> OperatorOutputs:
    """Append the step's tokens to the cache, then attend.  Inputs are left as they are.

    query       [1, Hq, N, D]; key, value [1, Hkv, N, D]: packed tokens after RoPE
    key_cache, value_cache [P, Hkv, page_size, D]; code_cache int32 [P, Hkv, L, W]; norm_cache [P, Hkv, page_size]
    page_table  int32 [B, M]: pages of each sequence in order; 0, the null page, where there is none
    past_length int32 [B]: tokens cached before this step
    query_start int32 [B + 1]: sequence b owns the tokens query_start[b] ... query_start[b + 1] - 1
    planes      [L, R, D]

    All tokens of the step are written before any is read.  A sequence may have no token in the step.  Tokens past
    query_start[B] are padding: they are not cached and their output is zero.  Several rows may name the same pages at
    consecutive past lengths with one token each: each is then a decode query of the same sequence.

    Returns the output [1, Hq, N, D] in query's dtype and the four caches after the step; projections, scores and
    softmax are computed in `compute_dtype`.
    Raises ValueError where a shape is wrong or a page lies outside the pool.
    """
    inputs = (
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
    )
    check_shapes(dict(zip(OPERATOR_INPUTS, inputs, strict=True)), attributes)
    _check_rows(page_table, past_length, query_start, query.shape[2], len(key_cache), attributes.page_size)
    past, start = past_length.tolist(), query_start.tolist()
    wide_planes = planes.to(compute_dtype)
    caches = append(key, value, key_cache, value_cache, code_cache, norm_cache, page_table, past, start, wide_planes)
    output = torch.zeros_like(query)
    for row, (first, last) in enumerate(itertools.pairwise(start)):
        if first == last:
            continue
        sequence = gather_sequence(*caches, page_table[row], past[row] + last - first, code_bits(planes.shape[1]))
        q = query[0, :, first:last].to(compute_dtype)
        mask = attended_set(q, sequence.codes, sequence.norms.to(compute_dtype), wide_planes, past[row], attributes)
        keys, values = sequence.keys.to(compute_dtype), sequence.values.to(compute_dtype)
        attended = attend(q, keys, values, mask, attributes.scale, attributes.softcap)
        output[0, :, first:last] = attended.to(query.dtype)
    return OperatorOutputs(output, *caches)


def append(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor,
    page_table: Tensor,
    past: list[int],
    start: list[int],
    planes: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four caches with this step's keys, values, codes and value norms in their slots; shapes as above.

    past [B] and start [B + 1] as numbers; planes [L, R, D] in the dtype to compute projections and norms in.
    """
    page_size, bits = key_cache.shape[2], code_bits(planes.shape[1])
    rows = [row for row in range(len(past)) for _ in range(start[row], start[row + 1])]
    positions = [past[row] + i for row in range(len(past)) for i in range(start[row + 1] - start[row])]
    position = torch.tensor(positions, dtype=torch.long, device=key.device)
    page = page_table[rows, position // page_size].long()
    slot = position % page_size

    k, v = (x[0, :, : start[-1]].transpose(0, 1) for x in (key, value))  # [tokens, Hkv, D]
    key_cache, value_cache, norm_cache = key_cache.clone(), value_cache.clone(), norm_cache.clone()
    key_cache[page, :, slot] = k
    value_cache[page, :, slot] = v
    norm_cache[page, :, slot] = torch.linalg.vector_norm(v.to(planes.dtype), dim=-1).to(norm_cache.dtype)
    codes = unpack_codes(code_cache, bits)  # [P, Hkv, L, page_size]
    codes[page, :, :, slot] = key_codes(k.to(planes.dtype), planes)
    return key_cache, value_cache, pack_codes(codes, bits), norm_cache


def gather_sequence(
    key_cache: Tensor,
    value_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor,
    pages: Tensor,
    length: int,
    bits: int,
) -> Sequence:
    """The first `length` tokens of the sequence that lives in `pages`, one row of the page table [M].

    bits: of a code, `socket_trt.config.code_bits`.
    """
    used = pages[: -(-length // key_cache.shape[2])].long()
    keys, values = (cache[used].transpose(0, 1).flatten(1, 2)[:, :length] for cache in (key_cache, value_cache))
    codes = unpack_codes(code_cache[used], bits).permute(1, 2, 0, 3).flatten(2)[..., :length]
    norms = norm_cache[used].transpose(0, 1).flatten(1)[:, :length]
    return Sequence(keys, values, codes, norms)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Exact softmax attention over the tokens that `mask` admits.

    query [Hq, n, D]; keys, values [Hkv, T, D]; mask bool [Hq, n, T].  Returns [Hq, n, D].
    """
    group = query.shape[0] // keys.shape[0]
    scores = query @ keys.repeat_interleave(group, 0).transpose(1, 2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values.repeat_interleave(group, 0)


def check_shapes(inputs: Mapping[str, Tensor], attributes: OperatorAttributes) -> None:
    """Raise ValueError with the first of the operator's inputs whose shape does not go with the others'.

    inputs  by name; query, key_cache, page_table and planes say what the sizes are
    """
    query_heads, tokens, head_size = inputs["query"].shape[1:]
    pages, kv_heads = inputs["key_cache"].shape[:2]
    tables, rank = inputs["planes"].shape[:2]
    sequences, row_pages = inputs["page_table"].shape
    page = attributes.page_size
    expected = {
        "query": (1, query_heads, tokens, head_size),
        "key": (1, kv_heads, tokens, head_size),
        "value": (1, kv_heads, tokens, head_size),
        "key_cache": (pages, kv_heads, page, head_size),
        "value_cache": (pages, kv_heads, page, head_size),
        "code_cache": (pages, kv_heads, tables, page * code_bits(rank) // 32),
        "norm_cache": (pages, kv_heads, page),
        "page_table": (sequences, row_pages),
        "past_length": (sequences,),
        "query_start": (sequences + 1,),
        "planes": (tables, rank, head_size),
    }
    for name, shape in expected.items():
        if tuple(inputs[name].shape) != shape:
            raise ValueError(f"{name} is {list(inputs[name].shape)}, expected {list(shape)}")
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads do not divide among {kv_heads} KV heads")


def _check_rows(
    page_table: Tensor, past_length: Tensor, query_start: Tensor, tokens: int, pages: int, page_size: int
) -> None:
    """Raise ValueError with the first row that holds more than it can, or names a page that is not there."""
    start = query_start.tolist()
    if start[0] != 0 or start != sorted(start) or start[-1] > tokens:
        raise ValueError(f"query_start must rise from 0 to at most {tokens}, got {start}")
    for row, past in enumerate(past_length.tolist()):
        length = past + start[row + 1] - start[row]
        used = -(-length // page_size)
        if past < 0 or used > page_table.shape[1]:
            raise ValueError(
                f"sequence {row} has {length} tokens, its row of the page table holds {page_table.shape[1]} pages"
            )
        row_table = page_table[row, :used]
        if used and (int(row_table.min()) < 0 or int(row_table.max()) >= pages):
            raise ValueError(f"sequence {row} names a page outside the pool of {pages} pages")
