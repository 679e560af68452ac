# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
"""Time what memory alone takes of a decode step: kernels that move the operator's bytes and do nothing with them.

    python benchmarks/traffic.py --output benchmarks/results

Three kernels for each shape of attention.py that has a goal: one reads as many bytes as codes and norms have and writes as
many as score keys, one reads those, one reads the rows of keys and values that as many random tokens have as every head
keeps.  All start at once with what they need; none computes, waits for another block or looks up a page.  So their sum
is what the operator would take if it were nothing but its memory traffic on this GPU, each kernel in the fastest of
several layouts.  Writes traffic-<gpu>.json and .md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.attention import HEAD_SIZE, KV_HEADS, SHAPE_COLUMNS, SHAPES, Shape, shape_cells, time_graph
from benchmarks.files import gpu_slug, output_directory, write_results

BLOCK = 4096  # words that a program reads at once; there are fewer than 2^31 of any kind
SETS = 4  # of inputs, one after another: together several times the L2 cache


@triton.jit
def stream(source, target, groups, READS: tl.constexpr, BLOCK: tl.constexpr):
    """Read READS blocks of words for each block written, `groups` times over all programs."""
    lanes = tl.arange(0, BLOCK)
    for group in range(tl.program_id(0), groups, tl.num_programs(0)):
        both = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(READS):
            both ^= tl.load(source + (group * READS + i) * BLOCK + lanes)
        tl.store(target + group * BLOCK + lanes, both)


@triton.jit
def read(source, target, blocks, BLOCK: tl.constexpr):
    """Read blocks of words; a program writes one."""
    lanes = tl.arange(0, BLOCK)
    both = tl.zeros([BLOCK], tl.int32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        both ^= tl.load(source + block * BLOCK + lanes)
    tl.store(target + tl.program_id(0), tl.xor_sum(both, 0))


@triton.jit
def gather(keys, values, slots, target, kept, parts, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Read the rows of a part of a list: [tokens, SIZE] of keys and of values, ROWS at once."""
    head, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    each = tl.cdiv(kept, parts)
    begin, end = part * each, tl.minimum(kept, (part + 1) * each)
    size = tl.arange(0, SIZE)
    both = tl.zeros([ROWS, SIZE], tl.float16)
    for at in range(begin, end, ROWS):
        place = tl.minimum(at + tl.arange(0, ROWS), end - 1)
        row = tl.load(slots + head.to(tl.int64) * kept + place).to(tl.int64)
        offset = row[:, None] * SIZE + size[None, :]
        both += tl.load(keys + offset) + tl.load(values + offset)
    tl.store(target + tl.program_id(0) * SIZE + size, tl.sum(both, 0))


def fastest(variants: Sequence[Callable[[int], object]]) -> float:
    """Microseconds of the fastest of several ways to do the same, each told which set of inputs to take."""
    return min(time_graph([lambda v=v, s=s: v(s) for s in range(SETS)]) for v in variants)


def random_slots(shape: Shape, lists: int) -> Tensor:
    """[lists, kept] slots of a pool [batch * KV heads, length], each list sorted and inside its own KV head's row."""
    rows = shape.batch * KV_HEADS
    chosen = [torch.randperm(shape.length, device="cuda")[: shape.kept].sort().values for _ in range(lists)]
    owner = torch.arange(lists, device="cuda") // (lists // rows)
    return (torch.stack(chosen) + owner[:, None] * shape.length).int()


def time_streams(shape: Shape, key_words: int) -> tuple[float, float]:
    """Microseconds of reading codes and norms while keys are written, and of reading those."""
    reads, groups = round(shape.scored_bytes / (key_words * 4)), key_words // BLOCK
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    programs = [multiprocessors * n for n in (2, 4, 8, 16)]
    codes = torch.zeros(SETS, groups * reads * BLOCK, dtype=torch.int32, device="cuda")
    keys = torch.zeros(SETS, groups * BLOCK, dtype=torch.int32, device="cuda")
    sums = torch.empty(programs[-1], dtype=torch.int32, device="cuda")
    score = fastest(
        [lambda s, n=n: stream[(n,)](codes[s], keys[s], groups, READS=reads, BLOCK=BLOCK) for n in programs]
    )
    return score, fastest([lambda s, n=n: read[(n,)](keys[s], sums, groups, BLOCK=BLOCK) for n in programs])


def time_gather(shape: Shape, lists: int) -> tuple[float, int]:
    """Microseconds of reading what the lists name, and how many different rows they name."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    most = max(1, shape.kept // 64)
    parts = sorted({min(most, math.ceil(n * multiprocessors / lists)) for n in (4, 8, 16, 32)})
    pool = torch.zeros(2, shape.batch * KV_HEADS * shape.length, HEAD_SIZE, dtype=torch.float16, device="cuda")
    slots = [random_slots(shape, lists) for _ in range(SETS)]
    sums = torch.empty(lists * parts[-1], HEAD_SIZE, dtype=torch.float16, device="cuda")

    def call(s: int, n: int) -> None:
        gather[(lists * n,)](pool[0], pool[1], slots[s], sums, shape.kept, n, ROWS=32, SIZE=HEAD_SIZE)

    rows = sum(x.unique().numel() for x in slots) // SETS
    return fastest([lambda s, n=n: call(s, n) for n in parts]), rows


def measure(shape: Shape) -> dict[str, Any]:
    lists = shape.batch * shape.selecting_heads
    key_words = lists * shape.length // 2
    score, select = time_streams(shape, key_words)
    torch.cuda.empty_cache()
    attend, rows = time_gather(shape, lists)
    return {
        **shape.fields,
        "score_us": score,
        "score_bytes": shape.scored_bytes + key_words * 4,
        "select_us": select,
        "select_bytes": key_words * 4,
        "attend_us": attend,
        "attend_bytes": rows * HEAD_SIZE * 4,
        "sum_us": score + select + attend,
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        f"# Memory traffic alone on {results['gpu']}",
        "",
        "Microseconds of kernels that only move the bytes of a decode step (TB/s in brackets; rows that several query heads "
        "read count once).",
        "",
        f"Made by `{results['command']}` with PyTorch {results['torch']}, Triton {results['triton']}.",
        "",
        f"| {SHAPE_COLUMNS} | codes and norms, writing keys | keys | kept rows | sum |",
        "|" + "---|" * 9,
    ]
    for row in results["rows"]:
        stages = " | ".join(
            f"{row[f'{s}_us']:.1f} ({row[f'{s}_bytes'] / row[f'{s}_us'] * 1e-6:.2f})"
            for s in ("score", "select", "attend")
        )
        lines.append(f"| {shape_cells(row)} | {stages} | **{row['sum_us']:.1f}** |")
    return "\n".join(lines) + "\n"


def main() -> None:
    output = output_directory(__doc__)
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": [],
    }
    for shape in SHAPES:
        if shape.goal is None:
            continue
        results["rows"].append(measure(shape))
        torch.cuda.empty_cache()
    text = table(results)
    print(text)
    if output:
        write_results(output / f"traffic-{gpu_slug(results['gpu'])}", results, text)


if __name__ == "__main__":
    main()
