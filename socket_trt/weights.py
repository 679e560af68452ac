"""Weights where they are: tensors located inside safetensors files by offset, and files recorded so that a change shows.

A safetensors file is an 8-byte little-endian header length, a JSON header that names dtype, shape and data offsets of
each tensor, and the data.  Reading headers alone is enough to point an engine at its weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from socket_trt.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# NumPy has no bfloat16: its bits travel as uint16.
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}

_HASH_BLOCK = 1 << 22


class TensorLocation(BaseModel):
    """A tensor's bytes: `length` bytes from `offset` in `file` (a name inside the checkpoint's directory)."""

    model_config = ConfigDict(frozen=True)

    file: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


class FileRecord(BaseModel):
    """What a file was when the engine was built."""

    model_config = ConfigDict(frozen=True)

    size: int
    mtime_ns: int
    sha256: str


def read_header(path: Path) -> dict[str, TensorLocation]:
    """Tensors of one safetensors file.  Raises CheckpointError where the file is missing, truncated or no safetensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (header_length,) = struct.unpack("<Q", file.read(8))
            if header_length > size - 8:
                raise CheckpointError(
                    f"{path}: truncated: the header alone needs {header_length + 8} bytes, {size} are there"
                )
            header = json.loads(file.read(header_length))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; download the checkpoint again or give its directory with --checkpoint"
        ) from None
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError):
        raise CheckpointError(f"{path}: not a safetensors file, or truncated; download it again") from None
    try:
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        return {name: _locate(path, size, 8 + header_length, name, entry) for name, entry in entries}
    except (AttributeError, KeyError, TypeError, ValueError):  # JSON, but not a header's
        raise CheckpointError(f"{path}: not a safetensors file; download it again") from None


def _locate(path: Path, size: int, base: int, name: str, entry: dict[str, Any]) -> TensorLocation:
    """A header's entry as a place in the file of `size` bytes, whose data begins at `base`."""
    begin, end = entry["data_offsets"]
    if base + end > size:
        raise CheckpointError(
            f"{path}: truncated: {name} ends at byte {base + end}, the file at {size}; download it again"
        )
    shape = tuple(entry["shape"])
    if entry["dtype"] in ITEM_SIZE and end - begin != math.prod(shape) * ITEM_SIZE[entry["dtype"]]:
        raise CheckpointError(f"{path}: {name} has {end - begin} bytes, which is not {entry['dtype']} {list(shape)}")
    return TensorLocation(file=path.name, offset=base + begin, length=end - begin, dtype=entry["dtype"], shape=shape)


def index_checkpoint(directory: Path) -> dict[str, TensorLocation]:
    """Every tensor of a checkpoint of one or several shards.  Raises CheckpointError where a shard or tensor is missing."""
    index = directory / INDEX_FILE
    if not index.exists():
        if not (directory / SINGLE_FILE).exists():
            raise CheckpointError(
                f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE}; a checkpoint in another format must be saved as "
                "safetensors first (model.save_pretrained(directory))"
            )
        return read_header(directory / SINGLE_FILE)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError):
        raise CheckpointError(f"{index}: not a safetensors index; download it again") from None
    tensors: dict[str, TensorLocation] = {}
    for shard in sorted(set(weight_map.values())):
        tensors |= read_header(directory / shard)
    missing = sorted(name for name in weight_map if name not in tensors)
    if missing:
        raise CheckpointError(
            f"{directory / weight_map[missing[0]]}: lacks {missing[0]}, which {INDEX_FILE} places there"
        )
    return tensors


def is_norm(name: str) -> bool:
    """Whether a weight scales a norm's output, by its name in the checkpoint."""
    return "norm" in name.rsplit(".", 2)[-2]


def map_tensor(directory: Path, location: TensorLocation) -> npt.NDArray[np.generic]:
    """The tensor as a read-only memory map; bfloat16 as uint16 bits."""
    path = directory / location.file
    return np.memmap(path, _NUMPY[location.dtype], "r", location.offset, location.shape)


def sha256_of(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file; `advance` is told of the bytes read as they go by."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def record_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> FileRecord:
    status = path.stat()
    return FileRecord(size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256_of(path, advance))


def check_files(directory: Path, records: dict[str, FileRecord]) -> None:
    """Raise CheckpointError unless every file is what it was.  A file is read only if its time of change moved."""
    for name, record in records.items():
        path = directory / name
        try:
            status = path.stat()
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: missing; the engine reads its weights from there. Put the checkpoint back, or build again"
            ) from None
        unchanged = status.st_size == record.size and (
            status.st_mtime_ns == record.mtime_ns or sha256_of(path) == record.sha256
        )
        if not unchanged:
            raise CheckpointError(f"{path}: changed since the engine was built; build again for the new checkpoint")
