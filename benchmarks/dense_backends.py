"""Dense decode attention of other libraries, where they are installed, over the caches of `benchmarks/attention.py`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Call = Callable[[], object]
WORKSPACE_BYTES = 128 << 20  # of FlashInfer, as its documentation has it


class Inputs(Protocol):
    """A step of one token a sequence: query [1, Hq, B, D]; caches [P, Hkv, page_size, D]; page_table int32 [B, M]."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    page_table: Tensor
    past_length: Tensor


def flashinfer_calls(sets: Sequence[Inputs]) -> list[Call]:
    """FlashInfer's decode over the paged caches as they are; the query's bytes are read as [B, Hq, D]."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    device = sets[0].query.device
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)  # of all calls, which follow one another

    def call(x: Inputs) -> Call:
        batch, columns = x.page_table.shape
        _, kv_heads, page_size, head_size = x.key_cache.shape
        first_page = torch.arange(batch + 1, dtype=torch.int32, device=device) * columns
        last_tokens = x.past_length % page_size + 1  # the current token is the last page's last
        pages = x.page_table.reshape(-1)
        decode = BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=first_page.clone(),
            paged_kv_indices_buffer=pages.clone(),
            paged_kv_last_page_len_buffer=last_tokens.clone(),
        )
        query = x.query.view(batch, -1, head_size)
        kinds = {"q_data_type": query.dtype, "kv_data_type": query.dtype}
        decode.plan(first_page, pages, last_tokens, query.shape[1], kv_heads, head_size, page_size, **kinds)
        return lambda: decode.run(query, (x.key_cache, x.value_cache))

    return [call(x) for x in sets]


def flash_attention_3_calls(sets: Sequence[Inputs]) -> list[Call]:
    """FlashAttention-3's decode over as many bytes of contiguous cache [B, T, Hkv, D]."""
    from flash_attn_interface import flash_attn_with_kvcache

    def call(x: Inputs) -> Call:
        batch = len(x.page_table)
        _, kv_heads, _, head_size = x.key_cache.shape
        lengths = x.past_length + 1
        size = (batch, int(lengths.max()), kv_heads, head_size)
        keys, values = (
            cache.reshape(-1)[: torch.Size(size).numel()].view(size) for cache in (x.key_cache, x.value_cache)
        )
        query = x.query.view(batch, 1, -1, head_size)
        return lambda: flash_attn_with_kvcache(query, keys, values, cache_seqlens=lengths)

    return [call(x) for x in sets]


class Backend(NamedTuple):
    module: str
    calls: Callable[[Sequence[Inputs]], list[Call]]


BACKENDS = {
    "flashinfer": Backend("flashinfer", flashinfer_calls),
    "flash_attention_3": Backend("flash_attn_interface", flash_attention_3_calls),
}


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(BACKENDS[name].module) is not None
