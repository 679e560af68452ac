"""The synthetic vocabulary that tasks are written in: a few special tokens, then words, keys and values."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from socket_trt.errors import ConfigError

Tokens = npt.NDArray[np.int32]

# Special tokens: the start of a text, the marker of a record, and what each kind of question begins with.
BEGIN, RECORD, ASK, TRACE, COMMON, FREQUENT = range(6)
SPECIAL = 8
# Tokens of a vocabulary that is large enough for every task's default size.
MIN_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Token ids 0 ... size - 1: `SPECIAL` special ones, a fifth of the others words, and keys and values alike.

    size          tokens of the model's vocabulary
    key_tokens    tokens a key has; keys are then size of the key range to that power
    value_tokens  tokens a value has
    Raises ConfigError where a size is out of its range.
    """

    size: int = 512
    key_tokens: int = 1
    value_tokens: int = 1

    def __post_init__(self) -> None:
        if self.size < MIN_SIZE:
            raise ConfigError(f"a vocabulary of {self.size} tokens is too small for tasks: {MIN_SIZE} are needed")
        if not (1 <= self.key_tokens <= 4 and 1 <= self.value_tokens <= 16):
            raise ConfigError("keys have 1 to 4 tokens, values 1 to 16")

    @property
    def words(self) -> range:
        """Of the haystack."""
        return range(SPECIAL, SPECIAL + (self.size - SPECIAL) // 5)

    @property
    def keys(self) -> range:
        first = self.words.stop
        return range(first, first + (self.size - first) // 2)

    @property
    def values(self) -> range:
        return range(self.keys.stop, self.size)

    @property
    def record_tokens(self) -> int:
        """Tokens of a record: its marker, a key, a value."""
        return 1 + self.key_tokens + self.value_tokens

    def draw_words(self, rng: np.random.Generator, count: int) -> Tokens:
        return rng.integers(self.words.start, self.words.stop, count, dtype=np.int32)

    def draw_keys(self, rng: np.random.Generator, count: int) -> Tokens:
        """Different keys: int32 [count, key_tokens].  Raises ConfigError where there are not as many."""
        return self._draw(rng, count, self.keys, self.key_tokens, "keys")

    def draw_values(self, rng: np.random.Generator, count: int) -> Tokens:
        """Values, of which two may be the same: int32 [count, value_tokens]."""
        return rng.integers(self.values.start, self.values.stop, (count, self.value_tokens), dtype=np.int32)

    def draw_different_values(self, rng: np.random.Generator, count: int) -> Tokens:
        """int32 [count, value_tokens].  Raises ConfigError where there are not as many."""
        return self._draw(rng, count, self.values, self.value_tokens, "values")

    @staticmethod
    def _draw(rng: np.random.Generator, count: int, among: range, tokens: int, what: str) -> Tokens:
        there_are = len(among) ** tokens
        if count > there_are:
            raise ConfigError(
                f"the task needs {count} different {what}, the vocabulary has {there_are}: give a larger one, more "
                f"tokens to a key or value, or a shorter length"
            )
        numbers = rng.choice(there_are, count, replace=False, shuffle=True)
        digits = [numbers // len(among) ** place % len(among) for place in reversed(range(tokens))]
        drawn: Tokens = (among.start + np.stack(digits, axis=-1)).astype(np.int32)
        return drawn
