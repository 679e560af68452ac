"""Packages that only some commands need: `pip install 'socket-trt[EXTRA]'` brings them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from socket_trt.errors import MissingDependencyError


@contextlib.contextmanager
def needs(extra: str, doing: str = "this", others: Mapping[str, str] | None = None) -> Iterator[None]:
    """Imports of what `doing` needs.  Raises MissingDependencyError with the extra that brings a missing package.

    others: packages that another extra brings.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        brings = (others or {}).get(error.name or "", extra)
        raise MissingDependencyError(
            f"{doing} needs the package '{error.name}': pip install 'socket-trt[{brings}]'"
        ) from None
