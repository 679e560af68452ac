from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from socket_trt.runtime.detokenizer import Detokenizer, StopStrings

HYPOTHESIS = settings(max_examples=200, derandomize=True, deadline=None)
TEXT = "Hello world, naïve 你好 👩‍🚀 done."


SPELLING = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def spelled(text: str) -> str:
    """The characters that stand for the bytes of `text` in a byte-level vocabulary."""
    return SPELLING.pre_tokenize_str(text)[0][0]


def byte_level() -> Tokenizer:
    """As Llama 3 and Qwen: tokens are byte strings, some of which end or begin inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    you, rocket = spelled("你"), spelled("🚀")
    merges = [(you[0], you[1]), (rocket[2], rocket[3]), ("l", "l"), (spelled(" "), "w"), (you[2], spelled("好")[0])]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = SPELLING
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral: words with a space in front, and bytes for what the vocabulary lacks."""
    words = ["<unk>", "▁Hello", "▁world", "▁", ",", "na", "ve", "▁done", ".", "o", "r"]
    vocabulary = {token: i for i, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5: the first word loses its space."""
    words = ["▁Hello", "▁world", "▁", ",", "lo", "é", "你好", "▁▁", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, metaspace)}


def pieces_of(tokenizer: Tokenizer, tokens: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    return [*map(detokenizer.push, tokens), detokenizer.flush()]


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pieces_of_any_tokens_make_up_their_decoding(name: str, skip_special_tokens: bool) -> None:
    tokenizer = TOKENIZERS[name]

    @HYPOTHESIS
    @given(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=24))
    def check(tokens: list[int]) -> None:
        pieces = pieces_of(tokenizer, tokens, skip_special_tokens)
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    check()


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_any_bytes_in_any_cut_make_up_their_decoding(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    characters = "你🚀"
    spelt = spelled(characters) if name == "byte_level" else [f"<0x{byte:02X}>" for byte in characters.encode()]
    special = tokenizer.get_vocab_size() - 1
    alphabet = [*(tokenizer.token_to_id(token) for token in [*spelt, "o"]), special]
    assert None not in alphabet

    @HYPOTHESIS
    @given(st.lists(st.sampled_from(alphabet), max_size=16))
    def check(tokens: list[int]) -> None:
        assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)

    check()


def test_no_piece_has_half_a_character() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    pieces = pieces_of(tokenizer, tokenizer.encode(TEXT).ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # some tokens do end inside a character


def test_text_comes_with_the_token_that_completes_it() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert pieces_of(tokenizer, tokenizer.encode("Hello").ids) == ["H", "e", "ll", "o", ""]
    words = TOKENIZERS["byte_fallback"]
    tokens = [words.token_to_id(token) for token in ("▁Hello", "▁world", "<0xC3>", "<0xAF>", "▁done")]
    assert pieces_of(words, tokens) == ["Hello", " world", "", "", "ï done", ""]


def test_what_is_left_comes_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    tokens = tokenizer.encode("a你").ids
    assert len(tokens) == 3
    assert pieces_of(tokenizer, tokens[:2]) == ["a", "", "\ufffd"]


def test_bytes_that_are_no_character_do_not_hold_the_text_back() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    lead = tokenizer.encode("🚀").ids[0]
    pieces = pieces_of(tokenizer, [lead] * 50)
    assert pieces == ["", *["\ufffd"] * 50]


def test_special_tokens_are_left_out_or_spelt() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    tokens = [tokenizer.token_to_id(token) for token in ("▁Hello", "</s>", "▁world")]
    assert pieces_of(tokenizer, tokens) == ["Hello", "", " world", ""]
    assert "".join(pieces_of(tokenizer, tokens, skip_special_tokens=False)) == "Hello</s> world"


@pytest.mark.parametrize("skipped", ["special", "unknown"])
def test_what_the_decoder_never_sees_does_not_end_a_run_of_bytes(skipped: str) -> None:
    """The last byte is no UTF-8, which makes its decoder replace the first as well."""
    tokenizer = TOKENIZERS["byte_fallback"]
    size = tokenizer.get_vocab_size()  # a model may have more tokens than its tokenizer
    tokens = [tokenizer.token_to_id("<0x6F>"), {"special": size - 1, "unknown": size}[skipped]]
    tokens.append(tokenizer.token_to_id("<0x80>"))
    assert tokenizer.decode(tokens) == "\ufffd\ufffd"
    assert pieces_of(tokenizer, tokens) == ["", "", "", "\ufffd\ufffd"]


class Measured:
    """A tokenizer, and how many tokens it had to decode at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.sizes.append(len(tokens))
        return self._tokenizer.decode(tokens, **options)


@pytest.mark.parametrize(("name", "token"), [("byte_level", "a"), ("byte_fallback", "na"), ("metaspace", "▁Hello")])
def test_a_token_costs_the_same_however_long_the_text_is(name: str, token: str) -> None:
    measured = Measured(TOKENIZERS[name])
    special = measured.get_vocab_size() - 1
    pieces_of(measured, [measured.token_to_id(token), special] * 100)  # type: ignore[arg-type]
    assert max(measured.sizes) <= 2
    assert len(measured.sizes) <= 201


def passed(stop: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    stop_strings = StopStrings(stop)
    out = [stop_strings.push(piece) for piece in pieces]
    return [*out, stop_strings.flush()], stop_strings.matched


def passed_character_by_character(stop: list[str], text: str) -> tuple[str, bool]:
    """The definition: stop at the first end of a stop string, and cut the longest that ends there."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@pytest.mark.parametrize(
    ("stop", "pieces", "expected", "matched"),
    [
        ([], ["a", "b"], ["a", "b", ""], False),
        (["END"], ["xE", "N", "Dy", "z"], ["x", "", "", "", ""], True),
        (["END"], ["xE", "N", "d"], ["x", "", "ENd", ""], False),
        (["END"], ["xE", "N"], ["x", "", "EN"], False),
        (["END"], ["EEN", "D"], ["E", "", ""], True),
        (["\n\n"], ["a\n", "b\n", "\n"], ["a", "\nb", "", ""], True),
        (["abcd", "bc"], ["abcd"], ["a", ""], True),
        (["abcd", "bc"], ["ab", "c"], ["", "a", ""], True),
        (["abc", "bc"], ["xab", "c"], ["x", "", ""], True),
        (["👩‍🚀"], ["a👩", "\u200d", "🚀"], ["a", "", "", ""], True),
    ],
)
def test_stop_strings(stop: list[str], pieces: list[str], expected: list[str], matched: bool) -> None:
    assert passed(stop, pieces) == (expected, matched)


@HYPOTHESIS
@given(
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=10),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(stop: list[str], pieces: list[str]) -> None:
    out, matched = passed(stop, pieces)
    assert ("".join(out), matched) == passed_character_by_character(stop, "".join(pieces))


@HYPOTHESIS
@given(stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), text=st.text("abc", max_size=12))
def test_only_the_beginning_of_a_stop_string_is_held_back(stop: list[str], text: str) -> None:
    out, matched = passed(stop, [text])
    if not matched:
        held = out[-1]
        assert not held or any(s.startswith(held) for s in stop)
