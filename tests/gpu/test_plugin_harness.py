"""Each plugin library on a GPU: created, serialised, recreated and attached by the harness, one step against the reference.

The harness is a program of its own, without PyTorch: tensors go through files.  Of TensorRT's lean runtime it needs no
more than `build/tensorrt-lean/<version>/tensorrt_lean_libs/libnvinfer_lean.so.<major>`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from socket_trt.config import INT32_MAX
from socket_trt.names import OPERATOR_INPUTS
from socket_trt.native import load_library, params_of
from tests.gpu.checks import Call, check, slots_in
from tests.gpu.test_attention import DECODE, MIXED, step_of
from tests.plugin_harness import ALL_MAJORS, fields_of, harness, runtime_library, write_case
from tests.steps import Row, Step

CASE = {"query_heads": 8, "kv_heads": 2, "head_size": 128, "tables": 60, "planes": 8, "page_size": 64}


def largest_of(step: Step) -> dict[str, tuple[int, ...]]:
    """A profile's maximum above the step: more tokens, sequences, pages and pages a sequence."""
    shapes = {name: list(getattr(step, name).shape) for name in OPERATOR_INPUTS}
    for name in ("query", "key", "value"):
        shapes[name][2] += 100
    for name in ("key_cache", "value_cache", "code_cache", "norm_cache"):
        shapes[name][0] *= 2
    shapes["page_table"] = [shapes["page_table"][0] + 13, shapes["page_table"][1] * 2]
    shapes["past_length"][0] += 13
    shapes["query_start"][0] += 13
    return {name: tuple(shape) for name, shape in shapes.items()}


def read(path: Path, like: Tensor) -> Tensor:
    return torch.from_numpy(np.fromfile(path, np.uint8)).view(like.dtype).view(like.shape).cuda()


def run_step(major: int, step: Step, directory: Path, *options: object) -> tuple[Call, str]:
    """Execute the step by the harness; what it left, and what it printed."""
    inputs, outputs = directory / "inputs", directory / "outputs"
    inputs.mkdir()
    outputs.mkdir()
    for name in OPERATOR_INPUTS:
        tensor: Tensor = getattr(step, name)
        tensor.contiguous().cpu().view(torch.uint8).numpy().tofile(inputs / f"{name}.bin")
    shapes = {name: tuple(getattr(step, name).shape) for name in OPERATOR_INPUTS}
    dtype = str(step.query.dtype).removeprefix("torch.")
    fields = fields_of(step.attributes.as_dict())
    case = write_case(directory / "case", fields, shapes, largest_of(step), dtype)
    result = harness(major, "run", case, "--data", inputs, "--output", outputs, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    caches = [
        read(outputs / f"{name}.bin", getattr(step, name))
        for name in ("key_cache", "value_cache", "code_cache", "norm_cache")
    ]
    workspace = torch.from_numpy(np.fromfile(outputs / "workspace.bin", np.uint8)).cuda()
    params = params_of(step.query, step.key_cache, step.page_table, step.planes, step.attributes)
    slots = slots_in(workspace, load_library().selection_view(params))
    output = read(outputs / "output.bin", step.query)
    return Call(output, tuple(caches), slots, step.query.shape[2] <= step.page_table.shape[0]), result.stdout


@ALL_MAJORS
@pytest.mark.parametrize("mode", ["in-place", "separate", "graph"])
@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
def test_agrees_with_the_reference(major: int, mode: str, rows: list[Row], tmp_path: Path) -> None:
    """Caches in place, caches apart (copied, with a warning), and captured in a CUDA graph by the very first call."""
    step = step_of(CASE | {"rows": rows, "dtype": torch.float16}, seed=3)
    call, printed = run_step(major, step, tmp_path, *([] if mode == "in-place" else [f"--{mode}"]))
    check(step, call)
    assert ("whole caches are copied" in printed) == (mode == "separate")


@pytest.mark.parametrize(
    ("major", "dtype"), [(8, torch.float16), *itertools.product((10, 11), (torch.float16, torch.bfloat16))], ids=str
)
def test_created_by_the_real_registry(major: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """The plugin that TensorRT's own registry creates, with every option that the operator has."""
    runtime = runtime_library(major)
    options = {"selection": "kv_head", "softcap": 5.0, "sliding_window": 700, "min_length": 100, "planes": 10}
    step = step_of(CASE | options | {"rows": MIXED, "dtype": dtype}, seed=4)
    call, printed = run_step(major, step, tmp_path, "--tensorrt", runtime)
    assert "the registry loads the library" in printed
    check(step, call)


@ALL_MAJORS
def test_dense(major: int, tmp_path: Path) -> None:
    """The operator of a dense engine: every sequence is attended whole."""
    step = step_of(CASE | {"rows": DECODE, "dtype": torch.float16, "min_length": INT32_MAX}, seed=5)
    call, _ = run_step(major, step, tmp_path)
    check(step, call)
