"""Weights on the GPU: one copy, read from safetensors through page-locked memory, or random ones drawn there."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from socket_trt.engine.manifest import EngineDirectory, Manifest
from socket_trt.errors import CheckpointError
from socket_trt.progress import Progress
from socket_trt.runtime.cuda import DeviceBuffer, Event, PinnedBuffer, Stream
from socket_trt.weights import TensorLocation, is_norm, map_tensor

ALIGNMENT = 256
STAGING_BYTES = 64 << 20
RANDOM_BLOCK_BYTES = 64 << 20

Array = npt.NDArray[Any]


def weight_bytes(manifest: Manifest) -> int:
    """GPU memory that the weights take at most; tied ones once."""
    return _layout(manifest, ())[1]


def _layout(manifest: Manifest, joint: Iterable[tuple[str, ...]]) -> tuple[dict[str, int], int]:
    """Offset of every weight in one allocation, and its size.

    Weights at one place of one file share their bytes.  Those of a tuple in `joint` lie side by side, all others apart.
    """
    offsets: dict[str, int] = {}
    placed: dict[tuple[str, int], int] = {}
    end = 0
    groups = [*joint]
    grouped = {name for group in groups for name in group}
    groups += [(name,) for name in manifest.weights.tensors if name not in grouped]
    for group in groups:
        for name in group:
            location = manifest.weights.tensors[name]
            key = (location.file, location.offset)
            if key not in placed:
                placed[key] = end
                end += math.prod(location.shape) * 2
            offsets[name] = placed[key]
        end = -(-end // ALIGNMENT) * ALIGNMENT
    return offsets, end


class DeviceWeights:
    """All weights of an engine in one allocation; `addresses` by name."""

    def __init__(self, manifest: Manifest, joint: Iterable[tuple[str, ...]] = ()) -> None:
        """`joint`: names of weights that a plan reads as one, or single ones.  Raises OutOfGpuMemoryError."""
        offsets, size = _layout(manifest, joint)
        self._buffer = DeviceBuffer(size)
        self.addresses = {name: self._buffer.address + offset for name, offset in offsets.items()}

    @property
    def size(self) -> int:
        return self._buffer.size

    def free(self) -> None:
        self._buffer.free()


def load_weights(engine: EngineDirectory, weights: DeviceWeights, stream: Stream, progress: Progress) -> None:
    """Fill `weights` from the checkpoint: the next block is converted while the last one is being copied.

    Raises CheckpointError for a value that the engine's dtype cannot hold.
    """
    manifest = engine.manifest
    unique = {(t.file, t.offset): name for name, t in reversed(manifest.weights.tensors.items())}
    tensors = [(name, manifest.weights.tensors[name]) for _, name in sorted(unique.items())]
    total = sum(location.length for _, location in tensors)
    staging = [_Staging(), _Staging()]
    workers = min(8, os.cpu_count() or 1)
    try:
        with progress.task("Copying the weights to the GPU", total) as advance, ThreadPoolExecutor(workers) as pool:
            turn = 0
            for name, location in tensors:
                source = map_tensor(engine.weights_directory, location).reshape(-1)
                for first in range(0, source.size, STAGING_BYTES // 2):
                    block = source[first : first + STAGING_BYTES // 2]
                    buffer = staging[turn % 2]
                    turn += 1
                    buffer.wait()
                    target = buffer.memory.bytes[: 2 * block.size].view(np.uint16)
                    _convert_in(pool, workers, name, block, location, manifest.dtype, target)
                    stream.to_device(weights.addresses[name] + 2 * first, buffer.memory.address, 2 * block.size)
                    buffer.copied.record(stream)
                    advance(block.nbytes)
        stream.synchronize()
    finally:
        stream.synchronize()
        for buffer in staging:
            buffer.free()


class _Staging:
    """A page-locked block and the event after which it may be written again."""

    def __init__(self) -> None:
        self.memory = PinnedBuffer(STAGING_BYTES)
        self.copied = Event()

    def wait(self) -> None:
        self.copied.synchronize()

    def free(self) -> None:
        self.copied.free()
        self.memory.free()


def _convert_in(
    pool: ThreadPoolExecutor,
    workers: int,
    name: str,
    source: Array,
    location: TensorLocation,
    dtype: str,
    target: npt.NDArray[np.uint16],
) -> None:
    """`convert` on slices side by side: NumPy lets other threads run meanwhile."""
    bounds = [source.size * i // workers for i in range(workers + 1)]
    spans = itertools.pairwise(bounds)
    jobs = [pool.submit(convert, source[a:b], location.dtype, dtype, target[a:b]) for a, b in spans if a < b]
    for job in jobs:
        try:
            job.result()
        except OverflowError as error:
            raise CheckpointError(
                f"{location.file}: {name} holds {error}, which {dtype} cannot hold; build with --dtype bfloat16 "
                "(TensorRT 10 and later)"
            ) from None


def convert(source: Array, stored: str, dtype: str, target: npt.NDArray[np.uint16]) -> None:
    """Write `source` (safetensors dtype `stored`; bfloat16 as uint16 bits) to `target` as bits of `dtype`.

    Raises OverflowError, with the value, where a finite value would become infinite.
    """
    if (stored, dtype) in (("F16", "float16"), ("BF16", "bfloat16")):
        target[:] = source.view(np.uint16)
        return
    if stored == "BF16":
        wide = (source.astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore"):
            wide = source.astype(np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        infinite = np.isinf(narrow)
        target[:] = narrow.view(np.uint16)
    else:
        bits = wide.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        target[:] = np.where(np.isnan(wide), (bits >> 16) | 0x40, rounded).astype(np.uint16)
        infinite = (target & 0x7FFF) == 0x7F80
    if infinite.any():
        lost = infinite & np.isfinite(source.astype(np.float64) if stored == "F64" else wide)
        if lost.any():
            raise OverflowError(f"{float(np.abs(wide[lost]).max()):g}")


def fill_randomly(
    manifest: Manifest, weights: DeviceWeights, stream: Stream, *, standard_deviation: float = 0.02, seed: int = 0
) -> None:
    """Random weights for benchmarks, in a second whatever the model's size.

    One block of normal values is copied to every matrix from another offset on; norms neither scale nor shift.
    """
    rng = np.random.default_rng(seed)
    count = RANDOM_BLOCK_BYTES // 2
    values = rng.standard_normal(count, dtype=np.float32) * np.float32(standard_deviation)
    # Gemma's norms multiply by one plus their weight.
    unit = np.float32(0.0 if manifest.model.family == "Gemma2" else 1.0)
    longest = max((math.prod(t.shape) for n, t in manifest.weights.tensors.items() if is_norm(n)), default=1)
    blocks = _on_device((values, np.full(longest, unit, np.float32)), manifest.dtype, stream)
    try:
        for name, location in manifest.weights.tensors.items():
            size = 2 * math.prod(location.shape)
            if is_norm(name):
                stream.on_device(weights.addresses[name], blocks[1].address, size)
            else:
                shift = 2 * int(rng.integers(0, count))
                copy_cyclic(stream.on_device, weights.addresses[name], size, blocks[0].address, 2 * count, shift)
        stream.synchronize()
    finally:
        for block in blocks:
            block.free()


def _on_device(arrays: Iterable[npt.NDArray[np.float32]], dtype: str, stream: Stream) -> list[DeviceBuffer]:
    buffers = []
    for array in arrays:
        memory = PinnedBuffer(2 * array.size)
        convert(array, "F32", dtype, memory.bytes[: 2 * array.size].view(np.uint16))
        buffers.append(DeviceBuffer(2 * array.size))
        stream.to_device(buffers[-1].address, memory.address, 2 * array.size)
        stream.synchronize()
        memory.free()
    return buffers


def copy_cyclic(
    copy: Callable[[int, int, int], None], target: int, size: int, source: int, period: int, shift: int
) -> None:
    """Fill `size` bytes from `target` on with the `period` bytes at `source`, repeated, beginning `shift` bytes in."""
    done, shift = 0, shift % period
    while done < size:
        part = min(size - done, period - shift)
        copy(target + done, source + shift, part)
        done, shift = done + part, 0
