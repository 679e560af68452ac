"""The kernels that only move bytes read and write all that they claim to; their times need a GPU."""

from __future__ import annotations

from benchmarks import traffic
from tests.triton_interpreter import run_script

SCRIPT = """
import torch

from benchmarks.traffic import gather, read, stream

torch.manual_seed(0)
BLOCK, READS, GROUPS = 64, 3, 5


def xor(words, axis):
    both = words.select(axis, 0).clone()
    for i in range(1, words.shape[axis]):
        both ^= words.select(axis, i)
    return both


source = torch.randint(-(2**31), 2**31, (GROUPS, READS, BLOCK), dtype=torch.int32)
target = torch.zeros(GROUPS, BLOCK, dtype=torch.int32)
stream[(2,)](source, target, GROUPS, READS=READS, BLOCK=BLOCK)
assert torch.equal(target, xor(source, 1))

sums = torch.zeros(2, dtype=torch.int32)
read[(2,)](source, sums, GROUPS * READS, BLOCK=BLOCK)
assert xor(sums, 0) == xor(source.view(-1), 0)

keys, values = torch.randn(2, 100, 16, dtype=torch.float16)
slots = torch.stack([torch.randperm(100)[:37] for _ in range(3)]).int()
output = torch.zeros(3 * 2, 16, dtype=torch.float16)
gather[(6,)](keys, values, slots, output, 37, 2, ROWS=1, SIZE=16)
expected = torch.stack([(keys.float() + values.float())[s.long()].sum(0) for s in slots])
torch.testing.assert_close(output.float().view(3, 2, 16).sum(1), expected, rtol=2e-2, atol=5e-2)
print("all of it")
"""


def test_kernels_move_what_they_claim() -> None:
    assert "all of it" in run_script(SCRIPT)


def test_table_says_bytes_a_second_and_sums() -> None:
    row = {
        "batch": 8,
        "length": 131072,
        "planes": 8,
        "kept_fraction": 0.03,
        "selection": "query_head",
        "score_us": 150.0,
        "score_bytes": 600_000_000,
        "select_us": 20.0,
        "select_bytes": 60_000_000,
        "attend_us": 130.0,
        "attend_bytes": 520_000_000,
        "sum_us": 300.0,
    }
    text = traffic.table({"gpu": "GPU", "command": "c", "torch": "t", "triton": "r", "rows": [row]})
    assert "| 8 | 128K | 8 | 3% | query_head | 150.0 (4.00) | 20.0 (3.00) | 130.0 (4.00) | **300.0** |" in text
