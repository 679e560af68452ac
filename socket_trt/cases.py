"""Decode steps as the command line names them: `1x128K` is one sequence of 131072 tokens."""

from __future__ import annotations

import dataclasses

from socket_trt.engine.manifest import Manifest
from socket_trt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step of `batch` sequences of `context` tokens each, the current one included."""

    batch: int
    context: int

    def pages(self, manifest: Manifest) -> int:
        return self.batch * -(-self.context // manifest.socket.page_size)

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.context} tokens"


def parse_cases(option: str, text: str) -> list[Case]:
    """Cases of `option`, separated by commas; K is 1024.  Raises ConfigError."""
    cases = []
    for part in text.split(","):
        batch, cross, length = part.strip().lower().partition("x")
        factor = 1024 if length.endswith("k") else 1
        digits = length.removesuffix("k")
        if not (cross and batch.isdigit() and digits.isdigit() and int(batch) and int(digits)):
            raise ConfigError(f"{option} {text}: give BATCHxTOKENS, such as 1x128K or 4x32768")
        cases.append(Case(int(batch), factor * int(digits)))
    return cases
