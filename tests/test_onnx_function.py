"""The operator's ONNX function body against the reference, run by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from socket_trt.config import SocketConfig
from socket_trt.onnx.function import function_body
from socket_trt.onnx.single import operator_model
from tests.steps import RAGGED, SMALL, Step, random_step

DTYPES = {torch.float32: 2e-6, torch.float16: 2e-3}


def run(step: Step, opset: int = 17) -> list[torch.Tensor]:
    model = operator_model(step.attributes, opset, step.query.dtype == torch.float16)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), step.inputs, strict=True)}
    return [torch.from_numpy(np.asarray(x)) for x in session.run(None, feeds)]


def assert_agrees(step: Step, opset: int = 17) -> None:
    expected, actual = step.reference(), run(step, opset)
    tolerance = DTYPES[step.query.dtype]
    torch.testing.assert_close(actual[0], expected.output, atol=tolerance, rtol=tolerance)
    for name, a, e in zip(("key", "value", "code", "norm"), actual[1:], expected[1:], strict=True):
        if name == "norm":
            torch.testing.assert_close(a, e, atol=tolerance, rtol=tolerance)
        else:
            assert torch.equal(a, e), f"{name} cache differs"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("planes", [6, 8, 10, 12])
@pytest.mark.parametrize("selection", ["query_head", "kv_head"])
def test_ragged_batch(dtype: torch.dtype, planes: int, selection: str) -> None:
    config = SMALL.model_copy(update={"planes": planes})
    config = SocketConfig.create(**config.model_dump() | {"selection": selection})
    assert_agrees(random_step(RAGGED, config, dtype=dtype, padding=3))
