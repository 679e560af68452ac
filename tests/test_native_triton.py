"""The Triton kernels in Triton's interpreter, on the CPU, against the reference's attention."""

from __future__ import annotations

from tests.triton_interpreter import run_script

SCRIPT = """
import torch

from plugins.triton.decode_attention import decode_attention
from plugins.triton.prefill_attention import prefill_attention
from socket_trt.reference import attend
from socket_trt.reference.selection import visible

torch.manual_seed(0)
HQ, HKV, D, SIZE, PAGES = 4, 2, 32, 16, 9
key_cache, value_cache = (torch.randn(PAGES, HKV, SIZE, D) for _ in range(2))
page_table = torch.tensor([[3, 7, 1, 5, 0], [2, 8, 99, 0, 0]], dtype=torch.int32)
scale = D**-0.5


def sequence(cache, row, length):
    pages = page_table[row, : -(-length // SIZE)].long()
    return cache[pages].transpose(0, 1).flatten(1, 2)[:, :length]


for softcap, window in ((0.0, -1), (2.0, -1), (0.0, 20)):
    # Prefill: 21 tokens behind 30 cached ones of row 0; tiles of 16.
    query = torch.randn(1, HQ, 21, D)
    output = torch.full_like(query, float("nan"))
    tiles = torch.tensor([[0, 0, 16, 30], [0, 16, 5, 46], [0, 0, 0, 0]], dtype=torch.int32)
    prefill_attention[(HQ, 3)](
        query, key_cache, value_cache, page_table, tiles, output, scale, softcap, window, 21, HQ, HKV, PAGES, 5, 4,
        CAPPED=softcap > 0, HEAD_SIZE=D, BLOCK_D=D, BLOCK_M=16, BLOCK_N=16,
    )
    mask = visible(30, 21, window, query.device).expand(HQ, -1, -1)
    expected = attend(query[0], sequence(key_cache, 0, 51), sequence(value_cache, 0, 51), mask, scale, softcap)
    torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)

    # Decode: item 0 dense over 51 tokens, item 1 sparse, item 2 none.
    query = torch.randn(1, HQ, 3, D)
    items = torch.tensor([[0, 0, 51, 1], [1, 1, 30, 2], [0, 2, 0, 0]], dtype=torch.int32)
    chosen = torch.stack([torch.randperm(30)[:13] for _ in range(HQ)])
    slots = torch.zeros(3, HQ, 64, dtype=torch.int32)
    slots[1, :, :13] = page_table[1, chosen // SIZE] * SIZE + chosen % SIZE
    counts = torch.zeros(3, HQ, dtype=torch.int32)
    counts[1] = 13
    past, starts = torch.tensor([50, 29, 0], dtype=torch.int32), torch.tensor([0, 1, 2, 2], dtype=torch.int32)
    for sparse, sets, combine in ((False, HKV, False), (True, HQ, False), (True, HQ, True)):
        parts = torch.full((3, HQ, 3, D), float("nan"))
        stats = torch.full((3, HQ, 3, 2), float("nan"))
        arrived, output = torch.zeros(3, sets, dtype=torch.int32), torch.full_like(query, float("nan"))
        decode_attention[(3, sets, 3)](
            query, key_cache, value_cache, page_table, past, starts, items, slots, counts, parts, stats, arrived, output, scale, softcap, window, 0, 3,
            HQ, HKV, HQ // sets, PAGES, 5, 4, 64, 3,
            SPARSE=sparse, HEAD_SIZE=D, BLOCK_D=D, BLOCK_N=16, COMBINE=combine, OVERLAPPED=False,
        )
        item, length = (1, 30) if sparse else (0, 51)
        mask = visible(length - 1, 1, window, query.device).expand(HQ, -1, -1)
        if sparse:
            mask = torch.zeros(HQ, 1, 30, dtype=torch.bool).scatter(2, chosen[:, None], True)
        keys, values = sequence(key_cache, item, length), sequence(value_cache, item, length)
        expected = attend(query[0, :, item : item + 1], keys, values, mask, scale, softcap)[:, 0]
        weight = torch.exp2(stats[item, :, :, 0] - stats[item, :, :, 0].amax(1, keepdim=True))
        part = torch.where(stats[item, :, :, 1:] > 0, parts[item], 0)
        total = (weight[..., None] * part).sum(1) / (weight * stats[item, :, :, 1]).sum(1, keepdim=True)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
        if combine:
            torch.testing.assert_close(output[0, :, item], expected, rtol=1e-4, atol=1e-5)
            assert torch.isnan(output[0, :, [0, 2]]).all(), "an item without work was written"
        assert torch.isnan(parts[2]).all(), "an item without work was written"
print("agrees")
"""


def test_kernels_in_the_interpreter_agree_with_the_reference() -> None:
    assert "agrees" in run_script(SCRIPT)
