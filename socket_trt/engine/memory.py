"""What an engine takes, and what a memory of a given size then holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel

from socket_trt.engine.manifest import Manifest

GIB = 1 << 30
# Of all memory, for activations, workspace and the runtime itself.
RESERVED = 0.1


class Memory(BaseModel):
    """Of an engine, in bytes, and in tokens that its cache holds.

    page_bytes             of one page of the cache, in all layers
    code_bytes             of that, what SOCKET adds to keys and values: codes and norms
    """

    weights_bytes: int
    page_bytes: int
    code_bytes: int
    pages_per_gib: int
    cached_tokens_per_gib: int


class Capacity(BaseModel):
    """What fits into `memory_bytes` beside the weights and a reserve.

    num_pages            pages of the cache, the null page included; 0 where not even the weights fit
    cached_tokens        tokens that they hold
    tokens_by_batch      tokens that each sequence may have where so many run together, the engine's limit at most
    full_sequences       sequences of the engine's limit that fit together
    """

    memory_bytes: int
    reserved_bytes: int
    num_pages: int
    cached_tokens: int
    tokens_by_batch: dict[int, int]
    full_sequences: int


def memory_of(manifest: Manifest) -> Memory:
    """Weights as the engine computes with them, each shared tensor once."""
    item = 4 if manifest.dtype == "float32" else 2
    tensors = manifest.weights.tensors.values()
    if tensors:
        unique = {(t.file, t.offset): t.shape for t in tensors}
        weights = sum(math.prod(shape) for shape in unique.values()) * item
    else:
        weights = sum(record.size for record in manifest.weights.files.values())
    page = manifest.cache_bytes_per_page()
    model, page_size = manifest.model, manifest.socket.page_size
    dense = model.layers * model.kv_heads * page_size * 2 * model.head_size * item
    return Memory(
        weights_bytes=weights,
        page_bytes=page,
        code_bytes=page - dense,
        pages_per_gib=GIB // page,
        cached_tokens_per_gib=GIB // page * page_size,
    )


def capacity(manifest: Manifest, memory_bytes: int, batches: Sequence[int]) -> Capacity:
    """What fits into `memory_bytes`; `batches`: numbers of sequences that run together, 1 or more."""
    own = memory_of(manifest)
    reserved = int(memory_bytes * RESERVED)
    pages = max((memory_bytes - reserved - own.weights_bytes) // own.page_bytes, 0)
    usable = max(pages - 1, 0)  # the null page holds nothing
    page_size, limit = manifest.socket.page_size, manifest.max_seq_len
    return Capacity(
        memory_bytes=memory_bytes,
        reserved_bytes=reserved,
        num_pages=pages,
        cached_tokens=usable * page_size,
        tokens_by_batch={batch: min(usable // batch * page_size, limit) for batch in batches},
        full_sequences=usable // -(-limit // page_size),
    )
