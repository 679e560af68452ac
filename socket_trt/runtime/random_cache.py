"""Caches full of random keys and values, for benchmarks: consistent, of realistic scale, and made in seconds.

A block of cache pages is drawn on the host, with the codes of its keys and the norms of its values; each layer's cache
repeats it from another page on.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from socket_trt import names
from socket_trt.engine.manifest import Manifest
from socket_trt.planes import draw_planes
from socket_trt.runtime.cuda import DeviceBuffer, PinnedBuffer, Stream
from socket_trt.runtime.device_weights import convert, copy_cyclic

TOKENS = 1 << 18
_ROWS_AT_ONCE = 1 << 14


@dataclasses.dataclass(frozen=True)
class RandomPages:
    """`count` pages of one KV head each: the bytes of the four caches, by kind, page after page."""

    count: int
    content: dict[str, npt.NDArray[np.uint8]]

    def page_bytes(self, kind: str) -> int:
        return self.content[kind].size // self.count


def draw_pages(manifest: Manifest, tokens: int = TOKENS, seed: int = 0) -> RandomPages:
    """Normal keys, normal values of uneven length, their codes and norms, in the engine's dtype."""
    socket, size = manifest.socket, manifest.model.head_size
    count = max(1, tokens // socket.page_size)
    rows = count * socket.page_size
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((rows, size), np.float32)
    values = rng.standard_normal((rows, size), np.float32) * rng.uniform(0.25, 1.75, (rows, 1)).astype(np.float32)
    codes = hash_keys(keys, draw_planes(socket.tables, socket.planes, size, socket.seed), socket.code_bits)
    by_page = codes.reshape(count, socket.page_size, socket.tables).transpose(0, 2, 1)
    content = {
        "key": _bits(keys, manifest.dtype),
        "value": _bits(values, manifest.dtype),
        "code": np.ascontiguousarray(by_page).view(np.uint8).reshape(-1),
        "norm": _bits(np.linalg.norm(values, axis=1), manifest.dtype),
    }
    return RandomPages(count, content)


def hash_keys(
    keys: npt.NDArray[np.float32], planes: npt.NDArray[np.float32], bits: int
) -> npt.NDArray[np.unsignedinteger]:
    """Codes, uint8 or uint16 [rows, L], of keys [rows, D] in the tables of `planes` [L, R, D]."""
    tables, rank, size = planes.shape
    places = (1 << np.arange(rank - 1, -1, -1)).astype(np.float32)
    projection = np.ascontiguousarray(planes.reshape(tables * rank, size).T, np.float32)
    codes = np.empty((len(keys), tables), np.uint8 if bits == 8 else np.uint16)
    for first in range(0, len(keys), _ROWS_AT_ONCE):
        signs = keys[first : first + _ROWS_AT_ONCE] @ projection >= 0
        codes[first : first + _ROWS_AT_ONCE] = signs.reshape(-1, tables, rank).astype(np.float32) @ places
    return codes


def _bits(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.uint8]:
    target = np.empty(values.size, np.uint16)
    convert(values.reshape(-1), "F32", dtype, target)
    return target.view(np.uint8)


def fill_caches(caches: dict[tuple[int, str], DeviceBuffer], pages: RandomPages, stream: Stream, seed: int = 0) -> None:
    """Fill caches by (layer, kind) on the GPU."""
    rng = np.random.default_rng(seed)
    shifts = {layer: int(rng.integers(0, pages.count)) for layer in sorted({layer for layer, _ in caches})}
    for kind in names.CACHE_KINDS:
        block = pages.content[kind]
        source, memory = DeviceBuffer(block.size), PinnedBuffer(block.size)
        memory.bytes[:] = block
        stream.to_device(source.address, memory.address, block.size)
        for (layer, own_kind), cache in caches.items():
            if own_kind == kind:
                shift = shifts[layer] * pages.page_bytes(kind)
                copy_cyclic(stream.on_device, cache.address, cache.size, source.address, block.size, shift)
        stream.synchronize()
        memory.free()
        source.free()
