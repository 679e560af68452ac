"""The kernel that does the whole of a decode step of few sequences: its sample, its lists, its thresholds, its parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.gpu.checks import check, long_step, run
from tests.gpu.test_attention import Case, config_of, name_of, step_of
from tests.steps import SMALL, Row, Step

# Constants of plugins/src/decode_fused.cu.
MOST_SETS, MOST_BLOCKS, HEADS, SAMPLE_UNITS, LEAST_SAMPLED = 16, 32, 4, 64, 16384
FIXED = SMALL.sink + SMALL.window
ONE: list[Row] = [(70000, 1)]
BASE: Case = {"query_heads": 4, "kv_heads": 1, "head_size": 128, "tables": 60, "planes": 8, "page_size": 128}
BASE |= {"selection": "query_head", "dtype": torch.float16}


def blocks_of(sequences: int, query_heads: int, kv_heads: int) -> int:
    """Blocks that share a KV head's query heads on this GPU; 0: separate kernels decode."""
    group = query_heads // kv_heads
    sets = sequences * kv_heads * -(-group // HEADS)
    if sets > MOST_SETS:
        return 0
    heads = min(group, HEADS)
    most = torch.cuda.get_device_properties(0).multi_processor_count // sets
    return min(most, MOST_BLOCKS) // heads * heads


def lengths(candidates: int) -> list[Row]:
    """Sequences that have so many tokens to choose among, one fewer and one more."""
    return [(candidates + FIXED + more - 1, 1) for more in (-1, 0, 1)]


def cases() -> Iterator[Case]:
    axes: list[Case] = [{"rows": ONE, "query_heads": h, "kv_heads": k} for h, k in ((1, 1), (2, 1), (3, 1), (4, 1))]
    axes += [{"rows": ONE, "query_heads": h, "kv_heads": k} for h, k in ((5, 1), (8, 1), (16, 2), (8, 8), (32, 8))]
    axes += [{"rows": rows} for rows in ([(70000, 1), (0, 1)], [(0, 1), (20000, 1)], [(1, 1), (40000, 1), (17000, 1)])]
    axes += [{"rows": [(40000, 1), (300, 2), (500, 0)]}]  # a prefill between
    axes += [{"rows": lengths(LEAST_SAMPLED), "query_heads": h} for h in (1, 4)]
    axes += [{"rows": lengths(1000), "budget_tokens": 1000, "budget_permille": 0}]  # all are chosen, or all but one
    axes += [{"rows": lengths(20000), "min_length": 20000 + FIXED}]
    axes += [{"rows": ONE, "head_size": 64, "page_size": p} for p in (16, 256)]
    axes += [{"rows": ONE, "tables": t, "planes": r} for t, r in ((64, 8), (33, 7), (32, 4), (1, 1))]
    axes += [{"rows": ONE, "sliding_window": w} for w in (1, 1000, 30000)]
    axes += [{"rows": ONE, "sink": 128, "window": 128}, {"rows": ONE, "sink": 0, "window": 1}]
    axes += [{"rows": ONE, "budget_tokens": b, "budget_permille": p} for b, p in ((0, 0), (1, 0), (100000, 0))]
    # More keys than a block holds in shared memory, and more tokens.
    axes += [{"rows": ONE, "budget_permille": p} for p in (300, 600, 999)]
    for axis, dtype in itertools.product(axes, (torch.float16, torch.bfloat16)):
        yield BASE | axis | {"dtype": dtype}
    yield BASE | {"rows": [(5000, 1)], "softcap": 5.0}
    # As many groups as the kernel takes, and one sequence more than that: separate kernels, with the same tables.
    for heads, sequences in ((8, 2), (8, 3), (4, 4), (4, 5)):
        yield BASE | {"rows": [(6000, 1)] * sequences, "query_heads": 4 * heads, "kv_heads": heads}


CASES = list(cases())


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{name_of(c)}" for i, c in enumerate(CASES)])
def test_agrees_with_the_float64_reference(case: Case) -> None:
    check(step_of(case, seed=len(name_of(case))))


def sampled(step: Step) -> Tensor:
    """Positions that the blocks of the step's only group take their sample from."""
    attributes, length = step.attributes, int(step.past_length[0]) + 1
    blocks = blocks_of(1, step.query.shape[1], step.key.shape[1])
    begin = attributes.sink // 256 * 256
    units = -(-(length - attributes.window - begin) // 128)
    parts = max(1, min(SAMPLE_UNITS // blocks, 16)) * 8
    positions = []
    for block in range(blocks):
        first, last = units * block // blocks, units * (block + 1) // blocks
        for part in range(parts):
            piece = begin + first * 128 + part * (last - first) * 8 // parts * 16
            positions += range(piece, piece + 16)
    positions = [p for p in positions if attributes.sink <= p < length - attributes.window]
    return torch.tensor(positions, device="cuda")


@pytest.mark.parametrize("share", [1, 12], ids=["twice", "once"])
def test_a_sample_that_misleads(share: int) -> None:
    """Sampled tokens have the best scores, so that too few tokens are collected above the first bound.

    One in twelve of them: the second bound serves.  All of them: it is too high as well, and every token is collected.
    """
    config = config_of(page_size=128, tables=60, planes=8, budget_permille=30)
    step = long_step(ONE, config, query_heads=4, kv_heads=1, head_size=128, dtype=torch.float16, seed=3)
    chosen = sampled(step)[::share]
    step.norm_cache[step.page_table[0, chosen // 128].long(), 0, chosen % 128] *= 50
    check(step)


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zero", "equal"])
@pytest.mark.parametrize("length", [10000, 70000])
def test_equal_scores_go_to_the_lower_position(value: float, length: int) -> None:
    """Every token's key is the same: whatever bound the sample gives, the first candidates are chosen."""
    config = config_of(page_size=128, tables=60, planes=8)
    step = long_step([(length, 1)], config, query_heads=4, kv_heads=1, head_size=128, dtype=torch.float16, seed=0)
    step.code_cache.zero_()
    step.norm_cache.fill_(value)
    call = run(step)
    pages = step.page_table[0, :-1].tolist()
    page_of = {page: i for i, page in enumerate(pages)}
    budget = ((length + 1) * step.attributes.budget_permille + 999) // 1000
    window = step.attributes.window
    expected = [*range(step.attributes.sink + budget), *range(length + 1 - window, length + 1)]
    for slots in call.slots[0]:
        assert [page_of[s // 128] * 128 + s % 128 for s in slots.tolist()] == expected


def test_good_tokens_side_by_side() -> None:
    """The budget's tokens are all in one warp's run, and most of the list is one block's."""
    config = config_of(page_size=128, tables=60, planes=8, budget_permille=10)
    step = long_step(ONE, config, query_heads=4, kv_heads=1, head_size=128, dtype=torch.float16, seed=4)
    position = torch.arange(40000, 40600, device="cuda")
    step.norm_cache[step.page_table[0, position // 128].long(), 0, position % 128] *= 50
    check(step)


def test_the_same_bits_every_time() -> None:
    step = step_of(BASE | {"rows": ONE, "query_heads": 32, "kv_heads": 8})
    first = run(step)
    for _ in range(20):
        again = run(step)
        assert torch.equal(first.output, again.output)
        assert all(torch.equal(a, b) for a, b in zip(first.slots[0], again.slots[0], strict=True))


def test_a_graph_serves_other_lengths() -> None:
    """Captured at one length and replayed at others, sampled and not, twice each: counters begin at zero every time."""
    from socket_trt.native import load_library, native_attention

    step = step_of(BASE | {"rows": [(70000, 1), (50000, 1)], "query_heads": 8, "kv_heads": 2})
    load_library().prepare()
    output = torch.empty_like(step.query)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native_attention(*step.inputs, step.attributes, in_place=True, output=output)
    for past in ((70000, 50000), (33000, 3), (0, 49999), (8000, 30000)):
        step.past_length.copy_(torch.tensor(past, dtype=torch.int32))
        expected = run(step).output
        for _ in range(2):
            output.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(output, expected)


def test_nonsense_on_the_device_is_harmless() -> None:
    """Pages, lengths, codes and norms out of range: no error, no hang."""
    step = step_of(BASE | {"rows": [(30000, 1), (70, 1)], "query_heads": 8, "kv_heads": 2})
    generator = torch.Generator(device="cuda").manual_seed(5)
    for name in ("page_table", "past_length", "query_start"):
        wild = torch.randint(-(2**31), 2**31 - 1, getattr(step, name).shape, generator=generator, device="cuda")
        run(step.replace(**{name: wild.to(torch.int32)}))
    for value in (float("nan"), float("inf"), -1.0):
        run(step.replace(norm_cache=torch.full_like(step.norm_cache, value)))
    torch.cuda.synchronize()
