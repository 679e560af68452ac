"""Which pages of the pool hold which sequence: the host's side of the paged cache.  The session owns the memory."""

from __future__ import annotations

import numpy as np

from socket_trt.runtime.session import IntArray, SessionLimits

NULL_PAGE = 0


class PagedCache:
    """Hands out the pool's pages to sequences and keeps one row of the page table for each.

    A page is at every moment either free or in exactly one row, since rows are the only way to take and to return
    pages: a row grows page by page and is returned whole.  Page 0, the null page, is never handed out.
    """

    def __init__(self, limits: SessionLimits) -> None:
        self.page_size = limits.page_size
        self.num_pages = limits.num_pages
        self._pages_per_sequence = limits.pages_per_sequence
        # A stack: the page returned last is taken first, while the machine's caches may still hold its lines.
        self._free = list(range(limits.num_pages - 1, NULL_PAGE, -1))
        self._rows: dict[int, list[int]] = {}

    @property
    def capacity(self) -> int:
        """Pages that can be handed out: all but the null page."""
        return self.num_pages - 1

    @property
    def pages_free(self) -> int:
        return len(self._free)

    @property
    def pages_in_use(self) -> int:
        return self.capacity - len(self._free)

    def pages_for(self, length: int) -> int:
        """Pages that `length` tokens take."""
        return -(-length // self.page_size)

    def grow(self, sequence: int, length: int) -> bool:
        """Let `sequence` hold `length` tokens: take the pages it lacks, all of them or none.

        sequence  any number that is not given to two live sequences
        length    tokens, at most `max_seq_len` of the session; never shrinks a row

        Returns False, with nothing changed, where the pool has too few free pages.
        Raises AssertionError where a row of the page table is too narrow for `length`.
        """
        wanted = self.pages_for(length)
        if wanted > self._pages_per_sequence:
            raise AssertionError(f"{length} tokens need {wanted} pages, a row holds {self._pages_per_sequence}")
        lacking = wanted - len(self._rows.get(sequence, ()))
        if lacking > len(self._free):
            return False
        if lacking > 0:
            self._rows.setdefault(sequence, []).extend(self._free.pop() for _ in range(lacking))
        return True

    def free(self, sequence: int) -> None:
        """Return all pages of `sequence`.  Raises AssertionError where it has none: freed twice, or never grown."""
        row = self._rows.pop(sequence, None)
        if row is None:
            raise AssertionError(f"sequence {sequence} holds no pages")
        self._free.extend(reversed(row))

    def page_table(self, sequences: list[int]) -> IntArray:
        """The page table of a step, int32 [len(sequences), M]: a row for each, in order; a sequence may come twice."""
        table = np.full((len(sequences), self._pages_per_sequence), NULL_PAGE, np.int32)
        for target, sequence in zip(table, sequences, strict=True):
            pages = self._rows[sequence]
            target[: len(pages)] = pages
        return table
