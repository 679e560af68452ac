"""What the attention benchmark asks of other libraries; the libraries themselves need a GPU."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.dense_backends import BACKENDS, is_installed
from benchmarks.files import gpu_slug

BATCH, LENGTH, PAGES, QUERY_HEADS, KV_HEADS, PAGE_SIZE, HEAD_SIZE = 3, 100, 7, 8, 2, 16, 64


@pytest.fixture
def inputs() -> SimpleNamespace:
    caches = [torch.randn(1 + BATCH * PAGES, KV_HEADS, PAGE_SIZE, HEAD_SIZE) for _ in range(2)]
    return SimpleNamespace(
        query=torch.randn(1, QUERY_HEADS, BATCH, HEAD_SIZE),
        key_cache=caches[0],
        value_cache=caches[1],
        page_table=1 + torch.randperm(BATCH * PAGES).to(torch.int32).view(BATCH, PAGES),
        past_length=torch.full((BATCH,), LENGTH - 1, dtype=torch.int32),
    )


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Dense attention of one token: query [Hq, D], keys and values [T, Hkv, D]; returns [Hq, D]."""
    heads = [x.transpose(0, 1) for x in (keys, values)]
    return torch.nn.functional.scaled_dot_product_attention(query[:, None], *heads, enable_gqa=True)[:, 0]


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_flashinfer_reads_the_pages_as_they_are(inputs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper:
        def __init__(self, workspace: Tensor, layout: str, **options: Any) -> None:
            assert (layout, options["use_cuda_graph"]) == ("HND", True)
            self.buffers = [options[f"paged_kv_{name}_buffer"] for name in ("indptr", "indices", "last_page_len")]

        def plan(self, *arguments: Any, **kinds: Any) -> None:
            assert all(torch.equal(a, b) for a, b in zip(arguments, self.buffers, strict=False))
            assert arguments[3:] == (QUERY_HEADS, KV_HEADS, HEAD_SIZE, PAGE_SIZE)

        def run(self, query: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
            """Dense attention by these arguments' documentation."""
            begin, pages, last = self.buffers
            outputs = []
            for row in range(len(last)):
                own = pages[begin[row] : begin[row + 1]].long()
                length = (len(own) - 1) * PAGE_SIZE + int(last[row])
                outputs.append(attend(query[row], *(x[own].transpose(1, 2).flatten(0, 1)[:length] for x in caches)))
            return torch.stack(outputs)

    install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    assert is_installed("flashinfer")
    (call,) = BACKENDS["flashinfer"].calls([inputs])
    output = call()
    row, position = 1, torch.arange(LENGTH)
    slots = inputs.page_table[row].long()[position // PAGE_SIZE], position % PAGE_SIZE
    keys, values = (cache.transpose(1, 2)[slots] for cache in (inputs.key_cache, inputs.value_cache))
    expected = attend(inputs.query.view(BATCH, QUERY_HEADS, HEAD_SIZE)[row], keys, values)
    assert isinstance(output, Tensor)
    assert torch.allclose(output[row], expected, atol=1e-5)


def test_flash_attention_3_reads_as_many_bytes(inputs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(query: Tensor, keys: Tensor, values: Tensor, cache_seqlens: Tensor) -> list[torch.Size]:
        assert cache_seqlens.tolist() == [LENGTH] * BATCH
        assert keys.data_ptr() == inputs.key_cache.data_ptr()
        return [query.shape, keys.shape, values.shape]

    install(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=decode)
    (call,) = BACKENDS["flash_attention_3"].calls([inputs])
    cache = (BATCH, LENGTH, KV_HEADS, HEAD_SIZE)
    assert call() == [(BATCH, 1, QUERY_HEADS, HEAD_SIZE), cache, cache]


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in BACKENDS.values():
        monkeypatch.delitem(sys.modules, backend.module, raising=False)
    monkeypatch.setattr(sys, "path", [])
    assert not any(map(is_installed, BACKENDS))


@pytest.mark.parametrize(
    ("gpu", "slug"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090")],
)
def test_files_are_named_after_the_gpu(gpu: str, slug: str) -> None:
    assert gpu_slug(gpu) == slug
