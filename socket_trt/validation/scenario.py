"""The steps that validation runs: ragged, chunked and mixed, on shuffled pages, long enough that attention is sparse."""

from __future__ import annotations

import dataclasses

import numpy as np

from socket_trt.config import AttentionKind, SocketConfig
from socket_trt.engine.manifest import Manifest
from socket_trt.runtime.session import IntArray, StepBatch

DECODE_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Steps over a fixed set of rows; `tokens` are the rows' whole texts, `num_pages` the pool they need."""

    steps: list[StepBatch]
    tokens: list[IntArray]
    num_pages: int

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.tokens]


def first_sparse_length(config: SocketConfig) -> int | None:
    """The shortest sequence of which a decode query leaves something out; None where there is none."""
    if config.budget_permille == 1000:
        return None
    fixed = config.sink + config.window
    length = max(config.min_length + 1, fixed + config.budget_tokens + 1)
    while length - fixed <= config.budget(length):  # the per-mille part grows more slowly than the length
        length += max(1, config.budget(length) - (length - fixed))
    return length


def validated_config(manifest: Manifest) -> SocketConfig:
    """The engine's configuration, sparse from the first token that can be left out.

    `min_length` is there for speed: a prompt of that length would take a CPU minutes, to compare the same operator.
    """
    if manifest.attention is AttentionKind.dense:
        return manifest.socket
    return manifest.socket.model_copy(update={"min_length": 0})


def make_scenario(manifest: Manifest, seed: int = 0) -> Scenario:
    """A long row in two prefill chunks and a short one beside it, then decode steps of both.

    The long row is half as long again as the first length that is sparse, and eight pages at least, as far as the
    engine's sequence limit lets it.
    """
    rng = np.random.default_rng(seed)
    sparse = first_sparse_length(validated_config(manifest)) or 0
    longest = manifest.max_seq_len
    long = min(max(sparse + sparse // 2, 8 * manifest.socket.page_size + 3), longest - DECODE_STEPS)
    if manifest.max_batch_size == 1:
        chunks = [[(0, long // 2)], [(long // 2, long)]]
    else:
        short = min(manifest.socket.page_size + 1, longest - DECODE_STEPS - 1)
        chunks = [[(0, long // 2), (0, short)], [(long // 2, long), (short, short + 1)]]
    ends = [end for _, end in chunks[-1]]
    for _ in range(DECODE_STEPS):
        chunks.append([(end, end + 1) for end in ends])
        ends = [end + 1 for end in ends]
    tokens = [rng.integers(0, manifest.model.vocabulary_size, end, dtype=np.int32) for end in ends]
    page_size = manifest.socket.page_size
    used = [-(-end // page_size) for end in ends]
    pages = rng.permutation(np.arange(1, sum(used) + 3, dtype=np.int32))
    table = np.zeros((len(ends), -(-longest // page_size)), np.int32)
    taken = 0
    for row, count in enumerate(used):
        table[row, :count] = pages[taken : taken + count]
        taken += count
    return Scenario([pack(tokens, spans, table) for spans in chunks], tokens, sum(used) + 3)


def pack(tokens: list[IntArray], spans: list[tuple[int, int]], page_table: IntArray) -> StepBatch:
    """The step in which row b's tokens spans[b] = (past length, end) are processed."""
    counts = [end - start for start, end in spans]
    boundaries = np.cumsum([0, *counts]).astype(np.int32)
    return StepBatch(
        input_ids=np.concatenate([row[start:end] for row, (start, end) in zip(tokens, spans, strict=True)]),
        position_ids=np.concatenate([np.arange(start, end, dtype=np.int32) for start, end in spans]),
        logits_indices=boundaries[1:] - 1,
        page_table=page_table,
        past_length=np.array([start for start, _ in spans], np.int32),
        query_start=boundaries,
    )
