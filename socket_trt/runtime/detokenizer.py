"""From tokens to text as it comes: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Detokenizer:
    """Decodes one sequence token by token: the pieces, flush included, make up the decoding of all its tokens.

    What a token adds depends on those before it (a first token loses its space, a character may take several tokens),
    so a short window is decoded each time: the tokens since the last clean boundary, and before them those of the
    piece that ended there, as context.

    `tokenizers.decoders.DecodeStream` is not used: it cannot say what is left at the end, and it raises where bytes
    that began as a character turn out to be none.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        added = tokenizer.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = frozenset(token for token, content in added.items() if content.special)
        self._window: list[int] = []
        self._context = 0  # tokens of the window that are context only
        self._context_length = 0  # characters of their text
        self._emitted = 0  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """The text that is certain now; "" while a character is incomplete."""
        name = self._tokenizer.id_to_token(token)
        if name is None or token in self._skipped:
            return ""  # the decoder never sees it: a character may go on after it
        self._window.append(token)
        if _BYTE_TOKEN.fullmatch(name):
            # One byte that is no UTF-8 makes its decoder replace every byte of the run: none is certain before its end.
            return ""
        text = self._decode()
        # Of bytes that are no character yet, only the last replacement can still become one.
        clean = not text.endswith(_REPLACEMENT)
        piece = self._take(text if clean else text[:-1])
        if clean and len(text) > self._context_length:
            del self._window[: self._context]
            self._context = len(self._window)
            self._context_length = self._emitted = len(self._decode())
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come, incomplete characters as U+FFFD."""
        return self._take(self._decode())

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens)
        return text

    def _take(self, text: str) -> str:
        piece = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return piece


class StopStrings:
    """Passes text on up to the stop string that is complete first (of several, the one that began first).

    What is passed on, and where it ends, does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """`stop`: strings that are not empty; none: everything passes at once."""
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.matched = False

    def push(self, piece: str) -> str:
        """What may be shown: all that cannot be the beginning of a stop string.  Nothing passes after a match."""
        if self.matched:
            return ""
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            self.matched, self._held = True, ""
            return text[: min(ends)[1]]
        held = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        passed, self._held = text[: len(text) - held], text[len(text) - held :]
        return passed

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)
