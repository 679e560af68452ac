"""A session without a model: its logits are a hash of everything a model's would depend on.

What a token leaves in the cache is (token id, position, kind of row that wrote it).  A row's logits are a hash of all
that its sequence has cached up to and including the wanted token, read through the page table.  So a wrong page, slot,
position, past length, query start or logits index, and a generated token that was cached by a prefill chunk (or a
prompt's by a decode row), all change the tokens that follow.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from socket_trt.runtime.sampling import SamplingParameters, sample
from socket_trt.runtime.session import FloatArray, IntArray, Session, SessionLimits, StepBatch

POISON = -1
DECODE, PREFILL = 0, 1


class FakeSession(Session):
    """Checks each batch against the operator's contract and keeps what it was given."""

    def __init__(self, limits: SessionLimits, max_step_tokens: int | None = None, fail_at: Sequence[int] = ()) -> None:
        """`fail_at`: numbers of the steps, from 0 on, that raise after having written the cache."""
        self._limits = limits
        self._max_step_tokens = max_step_tokens
        self._fail_at = frozenset(fail_at)
        self._store = np.full((limits.num_pages, limits.page_size, 3), POISON, np.int64)
        self.batches: list[StepBatch] = []

    @property
    def limits(self) -> SessionLimits:
        return self._limits

    def step(self, batch: StepBatch) -> FloatArray:
        self._check(batch)
        self.batches.append(batch)
        self._write(batch)
        if len(self.batches) - 1 in self._fail_at:
            raise RuntimeError("the device fell off the bus")
        ends = batch.past_length + batch.logits_indices - batch.query_start[:-1] + 1
        histories = [self._read(pages, end) for pages, end in zip(batch.page_table, ends, strict=True)]
        return np.stack([logits_of(history, self._limits.vocabulary_size) for history in histories])

    def _check(self, batch: StepBatch) -> None:
        limits, rows, tokens = self._limits, len(batch.past_length), len(batch.input_ids)
        for name, array in vars(batch).items():
            assert array.dtype == np.int32, name
        assert 1 <= rows <= limits.max_batch_size
        assert self._max_step_tokens is None or tokens <= self._max_step_tokens
        assert batch.position_ids.shape == (tokens,)
        assert batch.logits_indices.shape == (rows,)
        assert batch.page_table.shape == (rows, limits.pages_per_sequence)
        assert batch.query_start.shape == (rows + 1,)
        assert batch.query_start[0] == 0
        assert batch.query_start[-1] == tokens
        counts = np.diff(batch.query_start)
        assert (counts >= 1).all()
        assert (batch.logits_indices == batch.query_start[1:] - 1).all()
        positions = [past + i for past, count in zip(batch.past_length, counts, strict=True) for i in range(count)]
        assert batch.position_ids.tolist() == positions
        assert ((batch.input_ids >= 0) & (batch.input_ids < limits.vocabulary_size)).all()
        assert (batch.past_length + counts <= limits.max_seq_len).all()
        self._check_pages(batch, counts)

    def _check_pages(self, batch: StepBatch, counts: IntArray) -> None:
        """Rows have the pages they need; no two sequences share one; rows of one sequence are consecutive decodes."""
        sequences: dict[int, list[int]] = {}
        for row, pages in enumerate(batch.page_table):
            used = -(-(int(batch.past_length[row]) + int(counts[row])) // self._limits.page_size)
            assert (pages[:used] > 0).all(), "a needed page is the null page"
            assert (pages < self._limits.num_pages).all()
            sequences.setdefault(int(pages[0]), []).append(row)
        handed_out = [page for rows in sequences.values() for page in batch.page_table[rows[0]] if page]
        assert len(handed_out) == len(set(handed_out)), "a page is in two sequences, or twice in one"
        for rows in sequences.values():
            if len(rows) > 1:
                assert (batch.page_table[rows] == batch.page_table[rows[0]]).all()
                assert (counts[rows] == 1).all()
                assert (np.diff(batch.past_length[rows]) == 1).all()

    def _write(self, batch: StepBatch) -> None:
        for row, pages in enumerate(batch.page_table):
            first, last = batch.query_start[row], batch.query_start[row + 1]
            kind = DECODE if last - first == 1 else PREFILL
            for i, position in enumerate(range(batch.past_length[row], batch.past_length[row] + last - first)):
                page, slot = pages[position // self._limits.page_size], position % self._limits.page_size
                if slot == 0:  # the page has a new owner, or the same one that begins it again
                    self._store[page] = POISON
                self._store[page, slot] = batch.input_ids[first + i], batch.position_ids[first + i], kind

    def _read(self, pages: IntArray, length: int) -> np.ndarray:
        positions = np.arange(length)
        history = self._store[pages[positions // self._limits.page_size], positions % self._limits.page_size]
        assert (history != POISON).all(), "a slot is read that its sequence never wrote"
        return history


def logits_of(history: np.ndarray, vocabulary_size: int) -> FloatArray:
    """Logits, float32 [V], after a history of (token id, position, kind) [T, 3]."""
    seed = zlib.crc32(np.ascontiguousarray(history, np.int64).tobytes())
    return np.random.default_rng(seed).standard_normal(vocabulary_size).astype(np.float32) * 3


def tokens_alone(
    prompt: Sequence[int],
    parameters: SamplingParameters,
    *,
    vocabulary_size: int,
    max_seq_len: int,
    stop_token_ids: Sequence[int] = (),
    decoded: int = 0,
) -> list[int]:
    """The tokens a request gets on its own, computed without batches, pages or a scheduler."""
    assert parameters.seed is not None
    stops = {*parameters.stop_token_ids, *(() if parameters.ignore_eos else stop_token_ids)}
    prefilled = len(prompt) - decoded
    kind = DECODE if prefilled == 1 else PREFILL
    history = [(token, i, kind if i < prefilled else DECODE) for i, token in enumerate(prompt)]
    generated: list[int] = []
    while len(generated) < parameters.max_tokens and len(prompt) + len(generated) < max_seq_len:
        logits = logits_of(np.array(history), vocabulary_size)
        token = sample(logits, parameters, parameters.seed, len(generated))
        generated.append(token)
        if token in stops:
            break
        history.append((token, len(history), DECODE))
    return generated
