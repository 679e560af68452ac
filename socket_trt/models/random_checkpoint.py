"""Checkpoints of random weights: for `tiny`, for tests, and to try a model's shapes without its weights.

The layout (file, offset of every tensor) is planned from the shapes alone, so that a graph can be built for a checkpoint
that is not written; writing goes tensor by tensor, so that memory stays small.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from socket_trt.weights import INDEX_FILE, ITEM_SIZE, SINGLE_FILE, TensorLocation, is_norm

SHARD_BYTES = 4 << 30
SAFETENSORS_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TORCH_DTYPE = {name: dtype for dtype, name in SAFETENSORS_DTYPE.items()}


def plan_checkpoint(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> dict[str, TensorLocation]:
    """Where each tensor of a checkpoint will lie: in order, in shards of at most `shard_bytes` (a larger tensor alone)."""
    kind = SAFETENSORS_DTYPE[dtype]
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        length = int(np.prod(shape, dtype=np.int64)) * ITEM_SIZE[kind]
        if shards[-1] and sum(shards[-1].values()) + length > shard_bytes:
            shards.append({})
        shards[-1][name] = length
    located = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # The header's own length shifts the data: its offsets count from the data's start, so it is known first.
        begin = 0
        relative = {}
        for name, length in shard.items():
            relative[name] = (begin, begin + length)
            begin += length
        base = len(_header({n: (kind, shapes[n], span) for n, span in relative.items()}))
        for name, (start, end) in relative.items():
            located[name] = TensorLocation(
                file=file, offset=base + start, length=end - start, dtype=kind, shape=shapes[name]
            )
    return located


def write_checkpoint(
    directory: Path,
    plan: dict[str, TensorLocation],
    draw: Callable[[str, tuple[int, ...]], torch.Tensor],
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the planned files; `draw(name, shape)` gives each tensor in float32, `advance` is told of bytes written."""
    for file_name in dict.fromkeys(location.file for location in plan.values()):
        members = {name: location for name, location in plan.items() if location.file == file_name}
        base = min(location.offset for location in members.values())
        header = _header(
            {n: (t.dtype, t.shape, (t.offset - base, t.offset - base + t.length)) for n, t in members.items()}
        )
        with (directory / file_name).open("wb") as file:
            file.write(header)
            for name, location in members.items():
                tensor = draw(name, location.shape).to(_TORCH_DTYPE[location.dtype])
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
                advance(location.length)
    if len({location.file for location in plan.values()}) > 1:
        index = {
            "metadata": {"total_size": sum(location.length for location in plan.values())},
            "weight_map": {name: location.file for name, location in plan.items()},
        }
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2))


def random_tensor(name: str, shape: tuple[int, ...], std: float, norm_mean: float, seed: int) -> torch.Tensor:
    """A weight drawn from N(0, std^2), a norm's from N(norm_mean, std^2); the same for the same name and seed."""
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    values = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    return values.mul_(std).add_(norm_mean if is_norm(name) else 0.0)


def _header(entries: dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]) -> bytes:
    """Length and JSON header of a safetensors file, padded to 8 bytes as the format advises."""
    fields = {
        name: {"dtype": kind, "shape": list(shape), "data_offsets": list(span)}
        for name, (kind, shape, span) in entries.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **fields}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
