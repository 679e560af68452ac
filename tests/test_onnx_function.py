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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("planes", [8, 10])
def test_published_table_sizes(dtype: torch.dtype, planes: int) -> None:
    """L = 60 with R = 8 (8-bit codes) and R = 10 (16-bit codes), prefill chunks and decode steps in one batch."""
    config = SocketConfig(
        tables=60, planes=planes, sink=8, window=8, budget_tokens=0, budget_permille=100, page_size=32, min_length=0
    )
    rows = [(0, 50), (300, 1), (70, 20), (129, 1)]
    assert_agrees(random_step(rows, config, head_size=64, query_heads=8, kv_heads=2, dtype=dtype, seed=3))


@pytest.mark.parametrize("opset", range(17, 24))
def test_every_opset_gives_the_same(opset: int) -> None:
    assert_agrees(random_step(RAGGED, SMALL, padding=2), opset)


@pytest.mark.parametrize("options", [{"sliding_window": 20}, {"softcap": 2.0}, {"sliding_window": 7, "softcap": 1.0}])
@pytest.mark.parametrize("heads", [(4, 4), (6, 1), (8, 2)])
def test_window_softcap_and_head_groups(options: dict, heads: tuple[int, int]) -> None:
    assert_agrees(random_step(RAGGED, SMALL, query_heads=heads[0], kv_heads=heads[1], seed=4, **options))


@pytest.mark.parametrize("length", range(1, 36))
def test_lengths_around_pages_and_thresholds(length: int) -> None:
    assert_agrees(random_step([(length - 1, 1)], SMALL.model_copy(update={"min_length": 20}), seed=length))


def test_ties_go_to_the_lower_position() -> None:
    """Every cached key and value alike: the chosen tokens are the first ones behind the sink."""
    step = random_step([(100, 1)], SMALL, seed=5)
    page = step.page_table[0, : -(-100 // 16)].long()
    same = {
        "key_cache": step.key_cache.clone(),
        "code_cache": step.code_cache.clone(),
        "norm_cache": step.norm_cache.clone(),
    }
    for cache in same.values():
        cache[page] = 0
    same["norm_cache"][page] = 1
    assert_agrees(step.replace(**same))


@pytest.mark.parametrize("planes", [6, 10])
def test_every_slot_of_a_word(planes: int) -> None:
    """Codes share words: rewriting any run of slots must leave the others of the same word alone."""
    config = SMALL.model_copy(update={"planes": planes})
    for past in range(8):
        for count in (1, 2, 3, 5):
            assert_agrees(random_step([(past, count)], config, seed=10 * past + count))


def test_garbage_in_unused_pages_stays_there() -> None:
    step = random_step(RAGGED, SMALL, seed=6)
    used = {int(page) for row in step.page_table for page in row}
    unused = [page for page in range(step.key_cache.shape[0]) if page not in used or page == 0]
    for cache in (step.key_cache, step.value_cache, step.norm_cache):
        cache[unused] = float("nan")
    outputs = run(step)
    assert torch.isfinite(outputs[0]).all()
    assert torch.isnan(outputs[1][unused]).all()


def test_opsets_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="17 to 23"):
        function_body(24)


def test_the_schema_is_registered_and_checks_nodes() -> None:
    model = operator_model(SMALL.attributes(0.5), 17, half=False)
    onnx.checker.check_model(model, full_check=True)
    attributes = model.graph.node[0].attribute
    attributes.remove(next(attribute for attribute in attributes if attribute.name == "scale"))
    with pytest.raises(onnx.checker.ValidationError, match="'scale' is missing"):
        onnx.checker.check_model(model)
