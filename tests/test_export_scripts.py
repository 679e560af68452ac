"""The scripts in export/ as users run them; rewrite_onnx.py has tests of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx.helper import get_attribute_value

from socket_trt.config import INT32_MAX
from tests.families import save_checkpoint

SCRIPTS = Path(__file__).parent.parent / "export"
COVERED_ELSEWHERE = {"rewrite_onnx.py"}


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def export(script: str, family: str, directory: Path, *options: object) -> tuple[onnx.ModelProto, str]:
    checkpoint = save_checkpoint(family, directory / "checkpoint")
    output = directory / "model.onnx"
    result = run(script, checkpoint, output, *options)
    assert result.returncode == 0, result.stderr
    return onnx.load(str(output), load_external_data=False), result.stdout


def attributes(model: onnx.ModelProto, name: str) -> list[float]:
    nodes = [node for node in model.graph.node if node.op_type == "SocketAttention"]
    return [get_attribute_value(a) for node in nodes for a in node.attribute if a.name == name]


def test_every_script_is_run_by_a_test() -> None:
    named = Path(__file__).read_text()
    scripts = {path.name for path in SCRIPTS.glob("*.py")} - COVERED_ELSEWHERE
    assert scripts
    assert all(f'"{script}"' in named for script in scripts)


@pytest.mark.parametrize(("family", "window"), [("llama3.2", -1), ("mistral", 40)])
def test_llama_mistral(family: str, window: int, tmp_path: Path) -> None:
    options = ("--max-seq-len", 512, "--budget-permille", 30, "--opset", 17)
    model, printed = export("llama_mistral.py", family, tmp_path, *options)
    assert attributes(model, "sliding_window") == [window, window]
    assert attributes(model, "budget_permille") == [30, 30]
    assert model.opset_import[0].version == 17
    assert "2 SocketAttention nodes" in printed
    assert {i.external_data[0].value for i in model.graph.initializer if i.external_data} == {"model.safetensors"}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen(family: str, tmp_path: Path) -> None:
    model, printed = export("qwen.py", family, tmp_path, "--max-seq-len", 512)
    planes = next(i for i in model.graph.initializer if i.name == "socket.planes")
    assert list(planes.dims[:2]) == [60, 10]
    assert "16-bit codes" in printed


@pytest.mark.parametrize(("length", "chosen"), [(64, "short"), (512, "long")])
def test_phi3(length: int, chosen: str, tmp_path: Path) -> None:
    _, printed = export("phi3.py", "phi3-longrope", tmp_path, "--max-seq-len", length)
    assert f"of the {chosen} set" in printed


def test_gemma2(tmp_path: Path) -> None:
    model, printed = export("gemma2.py", "gemma2", tmp_path, "--max-seq-len", 512)
    assert attributes(model, "min_length") == [INT32_MAX, 0]
    assert attributes(model, "softcap") == [5.0, 5.0]
    assert "layer 0: sees the last 40 tokens, dense" in printed
    assert "layer 1: sees everything, selects" in printed


@pytest.mark.parametrize(
    ("script", "family"),
    [("llama_mistral.py", "gemma2"), ("qwen.py", "gemma2"), ("phi3.py", "gemma2"), ("gemma2.py", "phi3")],
)
def test_scripts_refuse_other_families(script: str, family: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(family, tmp_path / "checkpoint")
    result = run(script, checkpoint, tmp_path / "model.onnx")
    assert result.returncode == 1
    assert f"is a {family}; this script exports" in result.stderr
    assert not (tmp_path / "model.onnx").exists()
