from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from socket_trt.runtime.paged_cache import PagedCache
from socket_trt.runtime.session import SessionLimits

LIMITS = SessionLimits(vocabulary_size=8, page_size=4, num_pages=9, max_batch_size=4, max_seq_len=18)


def test_rows_grow_by_whole_pages_and_only_as_needed() -> None:
    cache = PagedCache(LIMITS)
    assert cache.capacity == 8
    assert [cache.pages_for(length) for length in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    assert cache.grow(7, 4)
    assert cache.pages_in_use == 1
    assert cache.grow(7, 5)
    assert cache.grow(7, 8)
    assert cache.grow(7, 2)
    assert (cache.pages_in_use, cache.pages_free) == (2, 6)


def test_growing_takes_all_the_pages_it_needs_or_none() -> None:
    cache = PagedCache(LIMITS)
    assert cache.grow(0, 16)
    assert cache.grow(1, 8)
    before = cache.page_table([1]).tolist()
    assert not cache.grow(1, 18)  # 3 more pages, 2 are free
    assert not cache.grow(2, 12)
    assert cache.page_table([1]).tolist() == before
    assert cache.pages_free == 2
    with pytest.raises(AssertionError, match="sequence 2 holds no pages"):
        cache.free(2)


def test_the_page_table_has_a_row_for_each_and_null_pages_after_the_last() -> None:
    cache = PagedCache(LIMITS)
    cache.grow(0, 5)
    cache.grow(1, 3)
    table = cache.page_table([1, 0, 1])
    assert table.dtype == np.int32
    assert table.shape == (3, LIMITS.pages_per_sequence)
    assert (table[0] == table[2]).all()
    assert np.count_nonzero(table, axis=1).tolist() == [1, 2, 1]
    assert len({*table[0], *table[1]} - {0}) == 3


def test_freeing_twice_and_outgrowing_a_row_are_assertions() -> None:
    cache = PagedCache(LIMITS)
    cache.grow(3, 6)
    cache.free(3)
    assert cache.pages_in_use == 0
    with pytest.raises(AssertionError, match="sequence 3 holds no pages"):
        cache.free(3)
    with pytest.raises(AssertionError, match="21 tokens need 6 pages, a row holds 5"):
        cache.grow(4, 21)


class CacheMachine(RuleBasedStateMachine):
    """Any order of growing and freeing, against lengths that are kept beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedCache(LIMITS)
        self.lengths: dict[int, int] = {}
        self.rows: dict[int, list[int]] = {}

    @rule(sequence=st.integers(0, 4), length=st.integers(1, LIMITS.max_seq_len))
    def grow(self, sequence: int, length: int) -> None:
        length = max(length, self.lengths.get(sequence, 0))
        held = -(-self.lengths.get(sequence, 0) // LIMITS.page_size)
        fits = -(-length // LIMITS.page_size) - held <= self.cache.pages_free
        assert self.cache.grow(sequence, length) is fits
        if fits:
            self.lengths[sequence] = length

    @rule(sequence=st.integers(0, 4))
    def free(self, sequence: int) -> None:
        if sequence in self.lengths:
            self.cache.free(sequence)
            del self.lengths[sequence], self.rows[sequence]

    @invariant()
    def every_page_has_one_owner(self) -> None:
        table = self.cache.page_table(list(self.lengths)) if self.lengths else np.zeros((0, 1), np.int32)
        owned = []
        for (sequence, length), row in zip(self.lengths.items(), table.tolist(), strict=True):
            count = -(-length // LIMITS.page_size)
            assert all(1 <= page < LIMITS.num_pages for page in row[:count])
            assert not any(row[count:])
            earlier = self.rows.get(sequence, [])
            assert row[: len(earlier)] == earlier, "a page of a live sequence moved"
            self.rows[sequence] = row[:count]
            owned += row[:count]
        assert len(owned) == len(set(owned)) == self.cache.pages_in_use
        assert self.cache.pages_in_use + self.cache.pages_free == self.cache.capacity


CacheMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, derandomize=True, deadline=None)
TestAnyOrder = CacheMachine.TestCase
