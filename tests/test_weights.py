"""Tensors located in safetensors files, and the files that are not what they should be."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from socket_trt.errors import CheckpointError
from socket_trt.models.random_checkpoint import plan_checkpoint, random_tensor, write_checkpoint
from socket_trt.weights import INDEX_FILE, check_files, index_checkpoint, map_tensor, record_file

SHAPES = {"a.weight": (3, 5), "b.norm.weight": (7,), "c.weight": (2, 2, 2), "d.weight": (4, 8)}


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return random_tensor(name, shape, 0.5, 1.0, seed=3)


def written(directory: Path, dtype: torch.dtype = torch.float32, shard_bytes: int = 1 << 20) -> Path:
    directory.mkdir(exist_ok=True)
    write_checkpoint(directory, plan_checkpoint(SHAPES, dtype, shard_bytes), draw)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_bytes", [1 << 20, 100])
def test_planned_files_are_safetensors(dtype: torch.dtype, shard_bytes: int, tmp_path: Path) -> None:
    """The safetensors library reads what was written, where the plan said it would be."""
    written(tmp_path, dtype, shard_bytes)
    plan = plan_checkpoint(SHAPES, dtype, shard_bytes)
    assert (len({location.file for location in plan.values()}) > 1) == (shard_bytes == 100)
    assert index_checkpoint(tmp_path) == plan
    for name, location in plan.items():
        with safe_open(tmp_path / location.file, "pt") as file:
            stored = file.get_tensor(name)
        assert stored.dtype == dtype
        assert torch.equal(stored, draw(name, SHAPES[name]).to(dtype))
        mapped = map_tensor(tmp_path, location)
        bits = stored.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else stored.numpy()
        assert (mapped == bits).all()


def test_files_of_the_library_are_indexed(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    index = index_checkpoint(tmp_path)
    assert (map_tensor(tmp_path, index["x"]) == tensors["x"].numpy()).all()
    assert index["y"].dtype == "BF16"


def test_random_tensors_depend_on_name_and_seed() -> None:
    assert torch.equal(draw("a.weight", (4,)), draw("a.weight", (4,)))
    assert not torch.equal(draw("a.weight", (4,)), draw("b.weight", (4,)))
    norm = random_tensor("layers.0.input_layernorm.weight", (4000,), 0.1, 1.0, 0)
    assert norm.mean() == pytest.approx(1.0, abs=0.02)
    assert random_tensor("layers.0.mlp.weight", (4000,), 0.1, 1.0, 0).mean() == pytest.approx(0.0, abs=0.02)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="save_pretrained"):
        index_checkpoint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    shard = sorted(written(tmp_path, shard_bytes=100).glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(shard.name)}: missing"):
        index_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_shard(keep: int, tmp_path: Path) -> None:
    shard = sorted(written(tmp_path, shard_bytes=100).glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{re.escape(shard.name)}: .*truncated"):
        index_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header", ["[]", '{"a": 1}', '{"a": {}}', '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}']
)
def test_json_that_is_no_header(header: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        index_checkpoint(tmp_path)


def test_a_shard_without_its_tensor(tmp_path: Path) -> None:
    index = json.loads((written(tmp_path, shard_bytes=100) / INDEX_FILE).read_text())
    index["weight_map"]["e.weight"] = index["weight_map"]["a.weight"]
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks e\.weight"):
        index_checkpoint(tmp_path)
    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        index_checkpoint(tmp_path)


def test_a_shape_that_does_not_fit_its_bytes(tmp_path: Path) -> None:
    path = written(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[3,5]", b"[3,4]"))
    with pytest.raises(CheckpointError, match=r"60 bytes, which is not F32 \[3, 4\]"):
        index_checkpoint(tmp_path)


def test_changes_since_the_build_are_seen(tmp_path: Path) -> None:
    path = written(tmp_path) / "model.safetensors"
    records = {path.name: record_file(path)}
    check_files(tmp_path, records)
    data = path.read_bytes()

    os.utime(path, (1, 1))  # touched, not changed
    check_files(tmp_path, records)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="changed since the engine was built"):
        check_files(tmp_path, records)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="changed since the engine was built"):
        check_files(tmp_path, records)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        check_files(tmp_path, records)
