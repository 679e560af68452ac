"""Every family from checkpoint to a validated engine: the whole path, and what is particular to each."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx.helper import get_attribute_value

from socket_trt.config import SocketConfig
from socket_trt.engine.build import BuildOptions, build_engine
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.models.checkpoint import resolve_model
from socket_trt.progress import Silent
from socket_trt.validation.validate import validate_engine
from tests.families import CONFIGS, save_checkpoint

# PyTorch's exporter is Python that coverage would trace; what these cover of the package others cover too.
pytestmark = pytest.mark.no_cover

SOCKET = SocketConfig(min_length=0, sink=8, window=8, budget_tokens=0, budget_permille=100, page_size=16)


def attention_nodes(engine: Path) -> list[dict]:
    graph = onnx.load(str(engine / "model.onnx"), load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "SocketAttention"]
    return [{a.name: get_attribute_value(a) for a in node.attribute} for node in nodes]


@pytest.mark.parametrize("name", CONFIGS)
def test_family_validates(name: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(name, tmp_path / "checkpoint")
    source = resolve_model(str(checkpoint))
    output = tmp_path / "engine"
    build_engine(source, output, BuildOptions(SOCKET, max_seq_len=512), Silent())
    report = validate_engine(EngineDirectory.open(output), Silent())
    print(name, *(f"{gate.gate}: {gate.outcome}, {gate.measured}" for gate in report.gates), sep="\n  ")
    assert [gate.outcome for gate in report.gates] == ["passed"] * 5
    assert len(attention_nodes(output)) == source.config.num_hidden_layers


def test_what_makes_families_different_reaches_the_operator(tmp_path: Path) -> None:
    found = {}
    for name in ("mistral", "gemma2"):
        source = resolve_model(str(save_checkpoint(name, tmp_path / name)))
        build_engine(source, tmp_path / f"{name}-engine", BuildOptions(SOCKET, max_seq_len=512), Silent())
        found[name] = attention_nodes(tmp_path / f"{name}-engine")
    assert [node["sliding_window"] for node in found["mistral"]] == [40, 40]
    assert [node["sliding_window"] for node in found["gemma2"]] == [40, -1]  # every second layer sees everything
    assert [node["softcap"] for node in found["gemma2"]] == [5.0, 5.0]
    assert found["gemma2"][0]["scale"] == pytest.approx(24**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine_dtype", ["float32", "float16"])
def test_checkpoint_dtypes_and_shards(dtype: torch.dtype, engine_dtype: str, tmp_path: Path) -> None:
    """Weights of another type than the engine's are cast in the graph; shards are read where they are."""
    checkpoint = save_checkpoint("llama3.2", tmp_path / "checkpoint", dtype=dtype, max_shard_size="200KB")
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    before = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    output = tmp_path / "engine"
    options = BuildOptions(SOCKET, dtype=engine_dtype, max_seq_len=512)  # type: ignore[arg-type]
    manifest = build_engine(resolve_model(str(checkpoint)), output, options, Silent())
    assert {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()} == before
    assert sum(file.stat().st_size for file in output.iterdir()) < 600_000  # nothing was copied
    assert manifest.weights.mode == "external"
    assert len(manifest.weights.files) > 1
    assert validate_engine(EngineDirectory.open(output), Silent()).passed


@pytest.mark.parametrize("max_seq_len", [64, 512])
def test_longrope_is_fixed_by_the_longest_sequence(max_seq_len: int, tmp_path: Path) -> None:
    checkpoint = save_checkpoint("phi3-longrope", tmp_path / "checkpoint")
    options = BuildOptions(SOCKET.model_copy(update={"budget_permille": 0}), max_seq_len=max_seq_len)
    build_engine(resolve_model(str(checkpoint)), tmp_path / "engine", options, Silent())
    assert validate_engine(EngineDirectory.open(tmp_path / "engine"), Silent()).passed
    graph = onnx.load(str(tmp_path / "engine" / "model.onnx"), load_external_data=False).graph
    (frequencies,) = [i for i in graph.initializer if i.name.endswith("inv_freq")]
    second = onnx.numpy_helper.to_array(frequencies)[1]
    factor = 1.01 if max_seq_len <= 64 else 1.5
    assert second == pytest.approx(10000 ** (-2 / 24) / factor, rel=1e-5)
