"""What a runtime has to do: perform one step of a packed ragged batch on a paged cache that it owns."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class SessionLimits:
    """What a session can hold.

    vocabulary_size  V, the width of a row of logits
    page_size        tokens a page of the cache
    num_pages        P, pages in the pool, page 0 (the null page, never handed out) included
    max_batch_size   B, rows a step may have at most
    max_seq_len      tokens of one sequence at most, prompt and generated
    """

    vocabulary_size: int
    page_size: int
    num_pages: int
    max_batch_size: int
    max_seq_len: int

    @property
    def pages_per_sequence(self) -> int:
        """M, the width of the page table."""
        return -(-self.max_seq_len // self.page_size)


def full_pool(max_batch_size: int, max_seq_len: int, page_size: int) -> int:
    """Pages, the null page included, of a pool in which a full batch of full sequences fits."""
    return 1 + max_batch_size * -(-max_seq_len // page_size)


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """Inputs of one step, named as the graph's: N packed tokens in B rows.

    input_ids, position_ids [N]; logits_indices [B], the token of each row whose logits are wanted (its last);
    page_table [B, M], 0 where a row has no page; past_length [B]; query_start [B + 1].

    A row with one token is a decode query and attends sparsely; a row with more is a prefill chunk and attends
    densely.  Several rows may belong to one sequence: all tokens of a step are written before any is read.
    """

    input_ids: IntArray
    position_ids: IntArray
    logits_indices: IntArray
    page_table: IntArray
    past_length: IntArray
    query_start: IntArray


class Session(ABC):
    """A model ready to run; owns the weights and the pool of cache pages."""

    @property
    @abstractmethod
    def limits(self) -> SessionLimits:
        """What this session can hold; constant."""

    @abstractmethod
    def step(self, batch: StepBatch) -> FloatArray:
        """Run one step, update the cache, and return the logits, float32 [B, V], of each row's wanted token.

        They may lie in the session's own memory and not be written to: whoever wants them after the next step, or after
        `close`, copies them.
        """

    def close(self) -> None:  # noqa: B027  (most sessions have nothing to free)
        """Free what the session holds outside Python's memory."""
