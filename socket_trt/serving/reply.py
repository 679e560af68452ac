"""How answers travel back, whatever carries them."""

from __future__ import annotations

import dataclasses
import enum
from typing import Protocol


class ErrorCode(enum.Enum):
    """Why a request has no answer, as clients are told."""

    invalid = enum.auto()  # the request is wrong: it will never be served
    unavailable = enum.auto()  # it may be sent again later, or elsewhere
    cancelled = enum.auto()
    internal = enum.auto()


@dataclasses.dataclass
class Piece:
    """A part of an answer: what came since the part before.  The last fields are those of the last part alone."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    final: bool = False


class Reply(Protocol):
    """The way back to one client.  Called from one thread at a time."""

    def send(self, piece: Piece) -> None:
        """Send a part of the answer; nothing may follow the final one."""

    def fail(self, code: ErrorCode, message: str) -> None:
        """Send an error instead of the rest of the answer; nothing may follow."""

    def cancelled(self) -> bool:
        """The client no longer waits, because it said so or is gone."""
