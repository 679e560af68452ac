from __future__ import annotations

import json
from typing import Any

import pytest

from socket_trt.config import SocketConfig
from socket_trt.engine.manifest import EngineDirectory, Manifest
from socket_trt.engine.memory import GIB, capacity, memory_of
from tests.engines import tiny_engine


def llama3_8b() -> Manifest:
    """The manifest of an engine with Llama-3-8B's shapes in float16."""
    fields: dict[str, Any] = json.loads(EngineDirectory.open(tiny_engine()).manifest.model_dump_json())
    fields["model"] |= {"layers": 32, "query_heads": 32, "kv_heads": 8, "head_size": 128}
    fields |= {"dtype": "float16", "max_seq_len": 131072, "max_batch_size": 64, "socket": SocketConfig().model_dump()}
    weights = {"file": "w", "dtype": "F16", "shape": [8_030_261_248], "offset": 0, "length": 2 * 8_030_261_248}
    fields["weights"]["tensors"] = {"w": weights, "tied": weights}
    return Manifest.model_validate(fields)


def test_a_page_and_a_gib() -> None:
    memory = memory_of(llama3_8b())
    assert memory.weights_bytes == 2 * 8_030_261_248
    # Keys and values of 128 tokens, 8 heads, 32 layers; a norm for each value; a byte for each of 60 tables.
    dense = 128 * 8 * 32 * 2 * 128 * 2
    codes = 128 * 8 * 32 * (2 + 60)
    assert (memory.page_bytes, memory.code_bytes) == (dense + codes, codes)
    assert memory.pages_per_gib == GIB // (dense + codes) == 57
    assert memory.cached_tokens_per_gib == 57 * 128


def test_what_a_gpu_holds() -> None:
    manifest = llama3_8b()
    fits = capacity(manifest, 80 * GIB, [1, 8, 64])
    page = memory_of(manifest).page_bytes
    assert fits.num_pages == (80 * GIB - 8 * GIB - 2 * 8_030_261_248) // page
    assert fits.cached_tokens == (fits.num_pages - 1) * 128
    assert fits.tokens_by_batch == {1: 131072, 8: (fits.num_pages - 1) // 8 * 128, 64: (fits.num_pages - 1) // 64 * 128}
    assert fits.full_sequences == (fits.num_pages - 1) // 1024
    used = fits.num_pages * page + 2 * 8_030_261_248 + fits.reserved_bytes
    assert 80 * GIB - page < used <= 80 * GIB


@pytest.mark.parametrize("memory", [8 * GIB, 0])
def test_a_gpu_that_does_not_hold_the_weights(memory: int) -> None:
    fits = capacity(llama3_8b(), memory, [1])
    assert (fits.num_pages, fits.cached_tokens, fits.full_sequences, fits.tokens_by_batch) == (0, 0, 0, {1: 0})
