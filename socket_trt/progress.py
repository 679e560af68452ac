"""How long work reports that it is alive, without knowing who watches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """A piece of work, shown while the context is open; `total` in the unit that the yielded function counts."""


class Silent:
    """Nobody watches."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Advance]:
        return contextlib.nullcontext(lambda _: None)
