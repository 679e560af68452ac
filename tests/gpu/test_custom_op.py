"""`torch.ops.socket_trt.attention` on CUDA tensors: the native library for 16-bit types, the reference for float32."""

from __future__ import annotations

import pytest
import torch

import socket_trt.ops  # noqa: F401  (registers the operator)
from socket_trt.native import native_attention
from tests.gpu.checks import on_gpu
from tests.steps import RAGGED, SMALL, random_step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_custom_operator(dtype: torch.dtype) -> None:
    step = on_gpu(random_step(RAGGED, SMALL, head_size=64, dtype=dtype, padding=2))
    before = [tensor.clone() for tensor in step.inputs]
    found = torch.ops.socket_trt.attention(*step.inputs, *step.attributes.as_dict().values())
    expected = step.reference() if dtype == torch.float32 else native_attention(*step.inputs, step.attributes)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for tensor, old in zip(step.inputs, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), old.nan_to_num())  # inputs are left as they are
