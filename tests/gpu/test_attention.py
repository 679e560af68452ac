"""The native operator on a GPU against the float64 reference, over shapes, dtypes, layouts and ragged batches."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from socket_trt.config import INT32_MAX, SocketConfig
from socket_trt.native import STAGES, native_attention
from tests.gpu.checks import Errors, check, long_step, on_gpu, relative, run
from tests.steps import RAGGED, SMALL, Row, Step, random_step

# Long enough that every scoring warp and several selection blocks have work; a mixture of prefill and decode.
DECODE: list[Row] = [(1500, 1), (2047, 1), (777, 1)]
LONG: list[Row] = [(70000, 1), (33000, 1)]
MIXED: list[Row] = [(300, 200), (1500, 1), (0, 70), (2047, 1), (64, 1), (129, 130)]

Case = dict[str, Any]


def config_of(**changes: Any) -> SocketConfig:
    return SocketConfig.create(**(SMALL.model_dump() | changes))


def cases() -> Iterator[Case]:
    """Every value of every axis with each batch layout; dtypes and selections crossed with all."""
    base: Case = {"rows": RAGGED, "padding": 3, "query_heads": 8, "kv_heads": 2, "head_size": 64}
    axes: list[Case] = [{"rows": rows, "padding": padding} for rows, padding in ((RAGGED, 3), (DECODE, 0), (MIXED, 5))]
    axes += [{"rows": DECODE, "head_size": d} for d in (64, 96, 128, 256)]
    axes += [{"rows": MIXED, "head_size": d} for d in (96, 128, 256)]
    axes += [{"rows": DECODE, "query_heads": h, "kv_heads": k} for h, k in ((1, 1), (2, 1), (6, 2), (8, 1), (16, 1))]
    axes += [{"rows": MIXED, "query_heads": h, "kv_heads": k} for h, k in ((3, 3), (7, 1), (16, 1))]
    axes += [{"rows": DECODE, "planes": r, "tables": t} for r, t in ((4, 60), (5, 128), (7, 33), (8, 60), (8, 128))]
    axes += [{"rows": DECODE, "planes": r, "tables": t} for r, t in ((9, 32), (10, 60), (10, 128), (12, 64), (16, 60))]
    axes += [{"rows": DECODE, "planes": r, "tables": t} for r, t in ((16, 128), (1, 1), (13, 5))]
    axes += [{"rows": DECODE, "planes": 10, "tables": 60, "query_heads": h, "kv_heads": 1} for h in (1, 2, 8, 16)]
    axes += [{"rows": rows, "page_size": p} for rows in (DECODE, MIXED) for p in (16, 32, 64, 128, 256)]
    axes += [{"rows": DECODE, "planes": 10, "page_size": p} for p in (16, 32, 256)]
    axes += [{"rows": rows, "sliding_window": w} for rows in (RAGGED, DECODE, MIXED) for w in (1, 50, 700)]
    axes += [{"rows": rows, "softcap": 5.0} for rows in (DECODE, MIXED)]
    axes += [{"rows": rows, "min_length": m} for rows in (RAGGED, DECODE, MIXED) for m in (40, 1600, INT32_MAX)]
    axes += [{"rows": DECODE, "budget_tokens": b, "budget_permille": p} for b, p in ((0, 0), (100, 30), (INT32_MAX, 0))]
    axes += [{"rows": DECODE, "sink": 0, "window": 1}, {"rows": DECODE, "sink": 3000}, {"rows": DECODE, "window": 3000}]
    axes += [{"rows": LONG, "planes": r, "tables": 60, "page_size": 128, "head_size": 128} for r in (8, 10)]
    axes += [{"rows": LONG, "budget_permille": 30, "sliding_window": 30000, "planes": r} for r in (8, 10)]
    axes += [{"rows": [(5, 1), (6, 1), (7, 1), (900, 2), (3, 0)], "padding": 0}]  # every token an item
    padded: list[Row] = [(900, 1), (5, 1), (3, 0), (0, 0)]
    axes += [{"rows": padded, "padding": 2, "min_length": m} for m in (0, 40)]  # items of no sequence, and dense ones
    for axis, dtype, selection in itertools.product(axes, (torch.float16, torch.bfloat16), ("query_head", "kv_head")):
        yield base | axis | {"dtype": dtype, "selection": selection}


CASES = list(cases())


def name_of(case: Case) -> str:
    shown = {k: v for k, v in case.items() if k != "rows"}
    return f"{sum(p + n for p, n in case['rows'])}tokens-" + "-".join(
        str(v).replace("torch.", "") for v in shown.values()
    )


def step_of(case: Case, seed: int = 0) -> Step:
    case = dict(case)
    rows = case.pop("rows")
    shapes = ("query_heads", "kv_heads", "head_size", "dtype", "padding", "sliding_window", "softcap")
    step_values = {k: case.pop(k) for k in shapes if k in case}
    if sum(past for past, _ in rows) > 10000:
        step_values.pop("padding", None)
        return long_step(rows, config_of(**case), seed=seed, **step_values)
    if rows == DECODE:
        step_values["padding"] = 0
    return on_gpu(random_step(rows, config_of(**case), seed=seed, **step_values))


@pytest.fixture(scope="module")
def worst() -> Iterator[Errors]:
    """The worst errors of the module; written to $SOCKET_TRT_TEST_REPORT (a file for each worker) where that is set."""
    errors = Errors()
    yield errors
    path = os.environ.get("SOCKET_TRT_TEST_REPORT")
    if path:
        Path(path + os.environ.get("PYTEST_XDIST_WORKER", "")).write_text(
            json.dumps(dataclasses.asdict(errors), indent=2)
        )
    print("worst:", errors)


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{name_of(c)}" for i, c in enumerate(CASES)])
def test_agrees_with_the_float64_reference(case: Case, worst: Errors) -> None:
    worst.join(check(step_of(case, seed=len(name_of(case)))))


def test_equal_scores_go_to_the_lower_position() -> None:
    """All values alike and all codes alike: every score ties, so that the first candidates are chosen."""
    config = config_of(page_size=64)
    step = long_step([(30000, 1)], config, query_heads=4, kv_heads=1, head_size=64, dtype=torch.float16, seed=0)
    step.code_cache.zero_()
    step.norm_cache.fill_(1.0)
    call = run(step)
    budget = (30001 * step.attributes.budget_permille + 999) // 1000
    for slots in call.slots[0]:
        pages = {page: i for i, page in enumerate(step.page_table[0, :-1].tolist())}
        size = step.attributes.page_size
        positions = sorted(pages[int(s) // size] * size + int(s) % size for s in slots.tolist())
        sink, window = step.attributes.sink, step.attributes.window
        assert positions == [*range(sink + budget), *range(30001 - window, 30001)]


@pytest.mark.parametrize("heads", [4, 112, 144])
@pytest.mark.parametrize("factor", [50, 1e-3])
def test_a_sample_that_misleads(factor: float, heads: int) -> None:
    """The tokens whose keys the scoring kernel keeps as a sample are the best, and fewer than the budget; or the worst, so
    far below the others that a histogram from their keys on does not tell those apart.  A head has a cluster, or a block.
    """
    config = config_of(page_size=128, tables=60, planes=8, budget_permille=30)
    shapes: Any = {"query_heads": heads, "kv_heads": heads // 4, "head_size": 64, "dtype": torch.float16}
    tokens = 70000 if heads == 4 else 33000
    step = long_step([(tokens, 1)], config, seed=3, **shapes)
    unit = torch.arange((tokens + 1) // 128, device="cuda")
    part = torch.cat([unit * 3 % 4, unit * 3 % 4 + 4])  # of a unit's eight parts of 16 tokens, two are sampled
    sampled = unit.repeat(2) * 128 + part * 16 + (unit.repeat(2) // 4 % 2) * 8
    step.norm_cache[step.page_table[0, sampled // 128].long(), :, sampled % 128] *= factor
    check(step)


@pytest.mark.parametrize("planes", [8, 10])
@pytest.mark.parametrize("selection", ["query_head", "kv_head"])
@pytest.mark.parametrize(("first", "count"), [(30000, 1000), (50048, 128), (68000, 1900), (20000, 12000)])
def test_the_best_tokens_lie_together(first: int, count: int, selection: str, planes: int) -> None:
    """One block, or a few of its warps, have nearly all that is selected, and more than they can hold."""
    config = config_of(page_size=128, tables=60, planes=planes, budget_permille=30, selection=selection)
    step = long_step([(70000, 1)], config, query_heads=4, kv_heads=2, head_size=64, dtype=torch.float16, seed=5)
    best = torch.arange(first, first + count, device="cuda")
    step.norm_cache[step.page_table[0, best // 128].long(), :, best % 128] *= 20
    check(step)


@pytest.mark.parametrize("heads", [4, 8, 16, 20, 28, 32, 64, 80, 144])
def test_every_number_of_blocks_for_a_head(heads: int) -> None:
    """Eight blocks make a head's list together, or fewer down to one, with a multiprocessor each or two sharing one."""
    config = config_of(page_size=128, tables=60, planes=8, budget_permille=30)
    step = long_step(
        [(33000, 1)], config, query_heads=heads, kv_heads=heads // 4, head_size=64, dtype=torch.float16, seed=6
    )
    check(step)


def test_a_block_that_selects_among_more_than_131072_tokens() -> None:
    config = config_of(page_size=128, tables=16, planes=8, budget_permille=5)
    step = long_step([(420000, 1)], config, query_heads=32, kv_heads=8, head_size=64, dtype=torch.float16, seed=7)
    check(step)


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_selection_and_attention_in_one_kernel_and_in_two(dtype: torch.dtype, head_size: int) -> None:
    """A call for both stages, which may run one kernel, and a call for each: the same lists, and outputs within rounding."""
    config = config_of(page_size=128, tables=60, planes=8, budget_permille=30)
    shapes: Any = {"query_heads": 16, "kv_heads": 4, "head_size": head_size, "dtype": dtype, "seed": 8}
    step = long_step([(40000, 1), (33001, 1)], config, **shapes)
    whole = run(step)
    first = STAGES["append"] | STAGES["score"] | STAGES["select"]
    apart = run(step, in_place=True, calls=(first, STAGES["attend"] | STAGES["combine"]))
    for item, heads in apart.slots.items():
        for one, other in zip(heads, whole.slots[item], strict=True):
            assert torch.equal(one, other)
    assert relative(whole.output, apart.output.double()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("window", [1, 5])
def test_several_rows_of_one_sequence(window: int) -> None:
    """Rows with the same pages at consecutive past lengths: each sees the tokens of the rows before it."""
    config = config_of(tables=16, window=window)
    step = random_step([(100, 3)], config, query_heads=4, kv_heads=2, head_size=64, dtype=torch.float16)
    rows = step.replace(
        page_table=step.page_table.repeat(3, 1),
        past_length=torch.tensor([100, 101, 102], dtype=torch.int32),
        query_start=torch.tensor([0, 1, 2, 3], dtype=torch.int32),
    )
    check(on_gpu(rows))


def test_in_place_equals_functional() -> None:
    step = step_of({"rows": MIXED, "dtype": torch.float16, "query_heads": 8, "kv_heads": 2, "head_size": 128})
    functional = run(step)
    in_place = run(step, in_place=True)
    for copied, own in zip(functional.caches, in_place.caches, strict=True):
        assert torch.equal(copied.view(torch.int16), own.view(torch.int16))
    assert in_place.caches[0].data_ptr() == step.key_cache.data_ptr()
    torch.testing.assert_close(functional.output, in_place.output, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
def test_graph_replay_equals_eager(rows: list[Row]) -> None:
    """A captured call, replayed after its inputs have changed, computes what an eager call computes."""
    from socket_trt.native import load_library

    case = {"rows": rows, "dtype": torch.float16, "query_heads": 8, "kv_heads": 2, "head_size": 128, "tables": 60}
    step, other = step_of(case, seed=1), step_of(case, seed=2)
    load_library().prepare()
    output = torch.empty_like(step.query)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native_attention(*step.inputs, step.attributes, in_place=True, output=output)
    for mine, theirs in zip(step.inputs, other.inputs, strict=True):
        mine.copy_(theirs)
    output.fill_(float("nan"))
    graph.replay()
    expected = run(other).output
    torch.testing.assert_close(output, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("heads", [4, 32, 144])
def test_every_replay_gives_the_same_bits(heads: int) -> None:
    """Nothing depends on which block of a cluster, or which kernel that overlaps another, is first."""
    from socket_trt.native import load_library

    config = config_of(page_size=128, tables=60, planes=8, budget_permille=30)
    shapes: Any = {"query_heads": heads, "kv_heads": heads // 4, "head_size": 128, "dtype": torch.float16}
    step = long_step([(33000, 1)], config, seed=9, **shapes)
    load_library().prepare()
    outputs = torch.full((40, *step.query.shape), torch.nan, dtype=step.query.dtype, device=step.query.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for output in outputs:
            native_attention(*step.inputs, step.attributes, in_place=True, output=output)
    expected = run(step).output
    for _ in range(5):
        outputs.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(output, expected) for output in outputs)


def test_nonsense_on_the_device_is_harmless() -> None:
    """Page numbers, lengths and boundaries out of range: no error, and nothing outside the sequence's pages changes."""
    step = step_of({"rows": MIXED, "dtype": torch.float16, "query_heads": 8, "kv_heads": 2, "head_size": 64})
    generator = torch.Generator(device="cuda").manual_seed(5)
    for name in ("page_table", "past_length", "query_start"):
        wild = torch.randint(-(2**31), 2**31 - 1, getattr(step, name).shape, generator=generator, device="cuda")
        run(step.replace(**{name: wild.to(torch.int32)}))
    torch.cuda.synchronize()
