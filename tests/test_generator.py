from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from socket_trt.errors import RequestError
from socket_trt.runtime.generator import TextGenerator
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import FinishReason, QueueFullError
from socket_trt.runtime.session import SessionLimits
from tests.fake_session import FakeSession, tokens_alone

LIMITS = SessionLimits(vocabulary_size=257, page_size=4, num_pages=33, max_batch_size=4, max_seq_len=64)
END_ID = 256


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


TOKENIZER = byte_tokenizer()


def make(**options: object) -> TextGenerator:
    fail_at = options.pop("fail_at", ())
    return TextGenerator(FakeSession(LIMITS, 16, fail_at), TOKENIZER, [END_ID], max_step_tokens=16, **options)  # type: ignore[arg-type]


def parameters(seed: int = 0, **values: object) -> SamplingParameters:
    return SamplingParameters(**{"max_tokens": 12, "temperature": 1.0, "seed": seed, **values})  # type: ignore[arg-type]


def expected_tokens(prompt: str, wanted: SamplingParameters) -> list[int]:
    return tokens_alone(
        TOKENIZER.encode(prompt).ids, wanted, vocabulary_size=257, max_seq_len=64, stop_token_ids=[END_ID]
    )


def test_a_batch_of_prompts_gets_the_text_that_each_gets_alone() -> None:
    prompts = ["Hello", "x", "你好, world", "A longer prompt, in several chunks", "Hello", "six"]
    wanted = [parameters(seed, max_tokens=10 + seed) for seed in range(6)]
    results = make().generate(prompts, wanted)
    assert results[0].text != results[4].text
    for prompt, own, result in zip(prompts, wanted, results, strict=True):
        expected = expected_tokens(prompt, own)
        assert list(result.token_ids) == expected
        assert result.text == TOKENIZER.decode(expected)
        assert result.prompt_tokens == len(prompt.encode())
        assert result.finish_reason is (FinishReason.stop_token if expected[-1] == END_ID else FinishReason.length)
        assert result.error is None


def test_a_stream_yields_the_text_of_the_result_in_pieces_that_are_not_empty() -> None:
    with make().stream("Hello", parameters()) as stream:
        pieces = list(stream)
    assert len(pieces) > 3
    assert all(pieces)
    assert "".join(pieces) == stream.result.text == TOKENIZER.decode(expected_tokens("Hello", parameters()))


def test_token_ids_may_stand_for_the_prompt() -> None:
    text, ids = make().generate(["Hello", TOKENIZER.encode("Hello").ids], parameters())
    assert text.token_ids == ids.token_ids
    assert text.prompt_tokens == ids.prompt_tokens == 5


def test_streams_may_be_read_in_turns() -> None:
    generator = make()
    streams = [generator.stream(prompt, parameters(seed)) for seed, prompt in enumerate(["one", "two", "three"])]
    turns = list(itertools.zip_longest(*streams, fillvalue=""))
    for seed, (prompt, stream) in enumerate(zip(["one", "two", "three"], streams, strict=True)):
        assert "".join(turn[seed] for turn in turns) == stream.result.text
        assert list(stream.result.token_ids) == expected_tokens(prompt, parameters(seed))
    assert generator.scheduler.idle


def test_the_stop_token_is_counted_and_not_shown() -> None:
    expected = expected_tokens("Hello", parameters())
    stop = expected[5]
    assert stop not in expected[:5]
    [result] = make().generate(["Hello"], parameters(stop_token_ids=(stop,)))
    assert list(result.token_ids) == expected[:6]
    assert result.text == TOKENIZER.decode(expected[:5])
    assert result.finish_reason is FinishReason.stop_token


def test_a_stop_string_ends_the_request_and_returns_its_pages() -> None:
    seed = ascii_seed()
    full = TOKENIZER.decode(expected_tokens("Hello", parameters(seed)))
    stop = full[4:7]
    assert full.index(stop) == 4
    generator = make()
    stream = generator.stream("Hello", parameters(seed, stop=("never", stop)))
    assert "".join(stream) == stream.result.text == full[:4]
    assert stream.result.finish_reason is FinishReason.stop_string
    assert len(stream.result.token_ids) < 12
    assert generator.scheduler.idle
    assert generator.scheduler.pages_in_use == 0


def test_a_stop_string_that_the_last_token_completes_is_the_reason() -> None:
    seed = ascii_seed()
    full = TOKENIZER.decode(expected_tokens("Hello", parameters(seed, max_tokens=8)))
    [result] = make().generate(["Hello"], parameters(seed, stop=(full[-2:],), max_tokens=8))
    assert result.finish_reason is FinishReason.stop_string
    assert result.text == full[:-2]
    assert len(result.token_ids) == 8


@pytest.mark.parametrize("reason", FinishReason)
def test_what_is_left_of_a_character_may_complete_a_stop_string(reason: FinishReason) -> None:
    """However the generation ends, no text passes the stop string; what cut it short is still the reason."""
    seed, following = incomplete_character()
    values = {
        FinishReason.length: {"max_tokens": 1},
        FinishReason.stop_token: {"stop_token_ids": (following,)},
    }.get(reason, {})
    generator = make(fail_at=[1] if reason is FinishReason.error else [])
    stream = generator.stream("Hello", parameters(seed, stop=("\ufffd",), **values))
    generator.advance()
    if reason is FinishReason.cancelled:
        stream.close()
    assert list(stream) == []
    assert stream.result.text == ""
    ended_early = reason in (FinishReason.cancelled, FinishReason.error)
    assert stream.result.finish_reason is (reason if ended_early else FinishReason.stop_string)


def incomplete_character() -> tuple[int, int]:
    """A seed whose first token from "Hello" is a byte that begins no character by itself, and the token after it."""
    for seed in range(1000):
        tokens = expected_tokens("Hello", parameters(seed, max_tokens=2))
        alone = TOKENIZER.decode(tokens[:1]) == "\ufffd" == TOKENIZER.decode(tokens)[:1]
        if alone and tokens[0] != tokens[1]:
            return seed, tokens[1]
    raise AssertionError("no such seed")


def ascii_seed() -> int:
    """A seed whose text from "Hello" begins with characters of one byte each, all different."""
    for seed in range(10000):
        tokens = expected_tokens("Hello", parameters(seed, max_tokens=8))
        text = TOKENIZER.decode(tokens)
        if len(tokens) == 8 and text.isascii() and len(set(text)) == 8 and len(text) == 8:
            return seed
    raise AssertionError("no such seed")


def test_text_that_was_held_back_comes_at_the_end() -> None:
    seed = ascii_seed()
    full = TOKENIZER.decode(expected_tokens("Hello", parameters(seed, max_tokens=8)))
    stream = make().stream("Hello", parameters(seed, max_tokens=8, stop=(full[-2:] + "never",)))
    pieces = list(stream)
    assert "".join(pieces) == full
    assert pieces[-1] == full[-2:]
    assert stream.result.finish_reason is FinishReason.length


def test_closing_a_stream_cancels_its_request() -> None:
    generator = make()
    with generator.stream("Hello", parameters()) as stream:
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = stream.result
        first = next(stream)
    assert stream.result.finish_reason is FinishReason.cancelled
    assert stream.result.text.startswith(first)
    assert generator.scheduler.idle
    assert generator.scheduler.pages_in_use == 0
    stream.close()
    assert stream.result.finish_reason is FinishReason.cancelled


def test_timings() -> None:
    ticks = itertools.count()
    [result] = make(clock=lambda: float(next(ticks))).generate(["Hello"], parameters(max_tokens=5, ignore_eos=True))
    assert (result.time_to_first_token, result.time_per_output_token) == (1.0, 1.0)
    [result] = make().generate(["Hello"], parameters(max_tokens=1))
    assert result.time_to_first_token is not None
    assert result.time_per_output_token is None


def test_a_step_that_raises_ends_with_an_error_and_the_text_so_far() -> None:
    generator = make(fail_at=[3])
    [result] = generator.generate(["Hello"], parameters())
    assert result.finish_reason is FinishReason.error
    assert isinstance(result.error, RuntimeError)
    assert list(result.token_ids) == expected_tokens("Hello", parameters())[:3]
    assert result.text == TOKENIZER.decode(result.token_ids)
    [again] = generator.generate(["Hello"], parameters())
    assert list(again.token_ids) == expected_tokens("Hello", parameters())


def test_a_request_that_cannot_be_served_leaves_nothing_behind() -> None:
    generator = make()
    with pytest.raises(RequestError, match="70 tokens"):
        generator.generate(["Hello", "x" * 70], parameters())
    with pytest.raises(RequestError, match="2 prompts, but sampling parameters for 1"):
        generator.generate(["Hello", "x"], [parameters()])
    assert generator.scheduler.idle
    assert generator.scheduler.steps == 0
    assert generator.generate([], parameters()) == []


def test_the_serving_path_imports_no_torch() -> None:
    code = "import sys, socket_trt.runtime.generator\nprint(*{'torch', 'transformers', 'onnx'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_text_and_tokens_can_be_taken_without_running_anything() -> None:
    """What a server does that advances the generator itself."""
    generator = make()
    stream = generator.stream("Hello", parameters(max_tokens=6, ignore_eos=True))
    assert (stream.take(), list(stream.token_ids), stream.ended) == ("", [], False)
    text, steps = "", 0
    while not stream.ended:
        generator.advance()
        steps += 1
        assert len(stream.token_ids) == steps
        text += stream.take()
        assert stream.take() == ""
    assert text == stream.result.text
    assert tuple(stream.token_ids) == stream.result.token_ids


def test_a_text_that_cannot_be_made_ends_its_own_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make()
    bad, good = (generator.stream(prompt, parameters(i)) for i, prompt in enumerate(["bad", "good"]))

    def push(token: int) -> str:
        raise ValueError("no such token")

    monkeypatch.setattr(bad._detokenizer, "push", push)
    assert list(bad) == []
    assert bad.result.finish_reason is FinishReason.error
    assert str(bad.result.error) == "no such token"
    assert "".join(good) == TOKENIZER.decode(expected_tokens("good", parameters(1)))
    assert generator.scheduler.idle
    assert generator.scheduler.pages_in_use == 0


def test_the_queue_limit_is_the_schedulers() -> None:
    generator = make(max_waiting=1)
    first = generator.stream("one", parameters())
    with pytest.raises(QueueFullError, match="1 requests wait already"):
        generator.stream("two", parameters())
    generator.advance()
    second = generator.stream("two", parameters())
    assert "".join(first) != "".join(second)
