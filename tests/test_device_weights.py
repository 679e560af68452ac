"""Weights on their way to the GPU: conversions, placing, and what a type cannot hold."""

from __future__ import annotations

import ctypes
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import CheckpointError
from socket_trt.progress import Silent
from socket_trt.runtime import device_weights
from socket_trt.runtime.cuda import Device, Stream
from socket_trt.runtime.device_weights import (
    DeviceWeights,
    convert,
    copy_cyclic,
    fill_randomly,
    load_weights,
    weight_bytes,
)
from tests.engines import tiny_engine
from tests.tensorrt_fixtures import OPTIONS, FakeMachine

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
TARGET = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """As `map_tensor` gives it: bfloat16 as bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("stored", TORCH)
@pytest.mark.parametrize("dtype", TARGET)
def test_conversions_round_as_pytorch_does(stored: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-9, 4, 20_000)
    values = torch.randn(20_000, generator=generator) * scales
    values = torch.cat([values.clamp(-6e4, 6e4), torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])
    source = values.to(TORCH[stored])
    target = np.empty(len(source), np.uint16)
    convert(array_of(source), stored, dtype, target)
    expected = source.float().to(TARGET[dtype]).view(torch.uint16).numpy()
    assert np.array_equal(target, expected)


def test_not_a_number_stays_one() -> None:
    target = np.empty(1, np.uint16)
    for dtype in TARGET:
        convert(np.array([np.nan], np.float32), "F32", dtype, target)
        assert torch.from_numpy(target).view(TARGET[dtype]).isnan().all()


@pytest.mark.parametrize(("stored", "dtype", "value"), [("BF16", "float16", 7e4), ("F32", "bfloat16", 3.4e38)])
def test_values_that_would_become_infinite_are_refused(stored: str, dtype: str, value: float) -> None:
    source = torch.tensor([1.0, value, float("inf")], dtype=torch.float32)
    with pytest.raises(OverflowError):
        convert(array_of(source.to(TORCH[stored])), stored, dtype, np.empty(3, np.uint16))


def engine_with(tmp_path: Path, dtype: torch.dtype, change: float | None = None) -> EngineDirectory:
    """An engine whose checkpoint was stored in another dtype; `change`: one value of it."""
    from tests.families import save_checkpoint
    from tests.test_network import SOCKET

    checkpoint = save_checkpoint("llama3.2", tmp_path / "checkpoint", dtype=dtype)
    if change is not None:
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["model.norm.weight"][3] = change
        save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    from socket_trt.engine.build import BuildOptions, build_engine
    from socket_trt.models.checkpoint import resolve_model

    options = BuildOptions(SOCKET, dtype="float16", backend="tensorrt", max_seq_len=256)
    build_engine(resolve_model(str(checkpoint)), tmp_path / "engine", options, Silent())
    return EngineDirectory.open(tmp_path / "engine")


def on_device(address: int, count: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * (2 * count)).from_address(address), np.float16)


def test_every_weight_arrives_and_tied_ones_once(
    machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.install()
    monkeypatch.setattr(device_weights, "STAGING_BYTES", 1 << 12)  # so that both blocks are used again and again
    engine = engine_with(tmp_path, torch.bfloat16)
    Device()
    weights = DeviceWeights(engine.manifest)
    load_weights(engine, weights, Stream(), Silent())
    stored = load_file(engine.weights_directory / "model.safetensors")
    for name, address in weights.addresses.items():
        key = name if name in stored else "model.embed_tokens.weight"
        expected = stored[key].half().numpy().reshape(-1)
        assert np.array_equal(on_device(address, expected.size), expected), name
    assert len({address % 256 for address in weights.addresses.values()}) == 1
    total = sum(math.prod(tensor.shape) for tensor in stored.values())
    assert 2 * total <= weight_bytes(engine.manifest) < 2 * total + 256 * len(stored)


def test_weights_in_one_place_of_a_file_share_their_bytes(machine: FakeMachine) -> None:
    machine.install()
    manifest = EngineDirectory.open(tiny_engine(**OPTIONS)).manifest
    tensors = manifest.weights.tensors | {"lm_head.weight": manifest.weights.tensors["model.embed_tokens.weight"]}
    tied = manifest.model_copy(update={"weights": manifest.weights.model_copy(update={"tensors": tensors})})
    Device()
    addresses = DeviceWeights(tied).addresses
    assert addresses["lm_head.weight"] == addresses["model.embed_tokens.weight"]
    assert len(set(addresses.values())) == len(addresses) - 1
    assert weight_bytes(tied) == weight_bytes(manifest) - 2 * 260 * 128


def test_weights_that_a_plan_reads_as_one_lie_side_by_side(machine: FakeMachine) -> None:
    machine.install()
    manifest = EngineDirectory.open(tiny_engine(**OPTIONS)).manifest
    parts = tuple(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
    Device()
    weights = DeviceWeights(manifest, [parts])
    expected = weights.addresses[parts[0]]
    for name in parts:
        assert weights.addresses[name] == expected
        expected += 2 * math.prod(manifest.weights.tensors[name].shape)
    assert weights.size <= weight_bytes(manifest)
    others = {address for name, address in weights.addresses.items() if name not in parts[1:]}
    assert len({address % 256 for address in others}) == 1


def test_a_weight_beyond_float16_is_one_clear_error(machine: FakeMachine, tmp_path: Path) -> None:
    trt = machine.install()
    engine = engine_with(tmp_path, torch.bfloat16, change=1e6)
    Device()
    weights, stream = DeviceWeights(engine.manifest), Stream()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds .*, which float16 cannot hold"):
        load_weights(engine, weights, stream, Silent())
    assert not trt.driver.pinned


def test_random_weights_are_normal_and_norms_are_one(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.install()
    monkeypatch.setattr(device_weights, "RANDOM_BLOCK_BYTES", 1 << 14)
    engine = EngineDirectory.open(tiny_engine(**OPTIONS))
    Device()
    weights = DeviceWeights(engine.manifest)
    fill_randomly(engine.manifest, weights, Stream())
    drawn = {}
    for name, location in engine.manifest.weights.tensors.items():
        values = on_device(weights.addresses[name], math.prod(location.shape)).astype(np.float32)
        if "norm" in name:
            assert (values == 1).all()
        else:
            assert 0.018 < values.std() < 0.022
            drawn[name] = values[:64].tobytes()
    assert len(set(drawn.values())) == len(drawn)


def test_copies_of_a_cycle() -> None:
    source, target = bytearray(range(10)), bytearray(35)

    def copy(to: int, start: int, size: int) -> None:
        target[to : to + size] = source[start : start + size]

    copy_cyclic(copy, 0, 35, 0, 10, 17)
    assert list(target) == [(7 + i) % 10 for i in range(35)]


def test_a_checkpoint_that_vanished_is_found_before_the_gpu_is_used(machine: FakeMachine, tmp_path: Path) -> None:
    from socket_trt.runtime.tensorrt_session import TensorRTSession

    trt = machine.install()
    engine = machine.compiled()
    shutil.rmtree(engine.path / "checkpoint")
    with pytest.raises(CheckpointError, match="missing"):
        TensorRTSession(engine)
    assert not trt.driver.allocations
