"""The ONNX Runtime session: steps on its own paged cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import EngineError
from socket_trt.models.packed import PackedModel, empty_caches
from socket_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from socket_trt.runtime.open import load_tokenizer, open_session
from socket_trt.validation.runners import feed_dict
from socket_trt.validation.scenario import make_scenario
from socket_trt.validation.torch_reference import load_model
from tests.engines import tiny_engine


@pytest.mark.parametrize("weights", ["external", "embedded"])
def test_steps_agree_with_the_packed_pytorch_model(weights: str) -> None:
    """The sparse path end to end: the same steps through ONNX Runtime and through PyTorch with the reference."""
    engine = EngineDirectory.open(tiny_engine(weights=weights))
    manifest = engine.manifest
    scenario = make_scenario(manifest, seed=3)
    model = PackedModel(load_model(engine), manifest.socket, manifest.model.head_size)
    caches = empty_caches(2, scenario.num_pages, 2, 64, manifest.socket, torch.float32)
    session = OnnxRuntimeSession(engine, scenario.num_pages)
    for step in scenario.steps:
        with torch.no_grad():
            expected, caches = model(*(torch.from_numpy(a) for a in feed_dict(step).values()), caches)
        np.testing.assert_allclose(session.step(step), expected.numpy(), atol=2e-5, rtol=2e-5)


def test_a_session_keeps_its_own_cache() -> None:
    engine = EngineDirectory.open(tiny_engine())
    scenario = make_scenario(engine.manifest)
    one, other = OnnxRuntimeSession(engine), OnnxRuntimeSession(engine)
    first = [one.step(step) for step in scenario.steps]
    assert not np.array_equal(other.step(scenario.steps[-1]), first[-1])  # nothing was cached there yet
    for step, expected in zip(scenario.steps, first, strict=True):
        assert np.array_equal(other.step(step), expected)


def test_a_page_outside_the_pool_is_an_error_and_not_a_wrong_answer() -> None:
    engine = EngineDirectory.open(tiny_engine())
    scenario = make_scenario(engine.manifest)
    with pytest.raises(Exception, match=r"indices|index|bounds"):
        OnnxRuntimeSession(engine, num_pages=2).step(scenario.steps[0])


def test_a_graph_that_onnx_runtime_refuses() -> None:
    with pytest.raises(EngineError, match="cannot run this graph"):
        OnnxRuntimeSession(EngineDirectory.open(tiny_engine()), graph=b"no graph")


def test_bfloat16_engines_are_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny_engine(), tmp_path / "engine")
    text = (tmp_path / "engine" / "build.json").read_text()
    (tmp_path / "engine" / "build.json").write_text(text.replace('"dtype": "float32"', '"dtype": "bfloat16"', 1))
    with pytest.raises(EngineError, match="no bfloat16"):
        OnnxRuntimeSession(EngineDirectory.open(tmp_path / "engine"))


def test_engines_of_another_backend_and_without_tokenizer(tmp_path: Path) -> None:
    shutil.copytree(tiny_engine(), tmp_path / "engine")
    tokenizer = tmp_path / "engine" / "tokenizer.json"
    tokenizer.write_text("{}")
    with pytest.raises(EngineError, match="not a tokenizer"):
        load_tokenizer(EngineDirectory.open(tmp_path / "engine"))
    tokenizer.unlink()
    with pytest.raises(EngineError, match=r"has no tokenizer.json"):
        load_tokenizer(EngineDirectory.open(tmp_path / "engine"))
    text = (tmp_path / "engine" / "build.json").read_text()
    (tmp_path / "engine" / "build.json").write_text(text.replace('"backend": "onnxruntime"', '"backend": "tensorrt"'))
    with pytest.raises(EngineError, match="socket-trt compile"):
        open_session(EngineDirectory.open(tmp_path / "engine"))
