"""Evaluation: through a session and its scheduler, through transformers with a method, and both the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from socket_trt.config import OperatorAttributes
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import ConfigError, EngineError
from socket_trt.progress import Silent
from socket_trt.quality import evaluate
from socket_trt.quality.attention import Choice, Decoder, chosen_attention
from socket_trt.quality.evaluate import EvalOptions, SampleResult, answer_all, parse_suite, run_eval
from socket_trt.quality.measures import Attention, Share
from socket_trt.quality.methods import Dense, Random, Socket
from socket_trt.quality.tasks import TASKS, make_sample
from socket_trt.quality.vocabulary import Vocabulary
from socket_trt.runtime.session import FloatArray, SessionLimits, StepBatch
from socket_trt.validation.torch_reference import load_model
from tests.engines import SOCKET, tiny_engine
from tests.fake_session import FakeSession
from tests.test_cli import Run, assert_one_line_error, run  # noqa: F401  (a fixture)

LENGTH = 96
VOCABULARY = Vocabulary(260)
LIMITS = SessionLimits(vocabulary_size=512, page_size=8, num_pages=49, max_batch_size=4, max_seq_len=128)


def options(tasks: tuple[str, ...] = ("single", "multi-query"), samples: int = 3, **changes: object) -> EvalOptions:
    fields = {"length": LENGTH, "seed": 0, "vocabulary": VOCABULARY} | changes
    return EvalOptions(tasks, samples=samples, **fields)  # type: ignore[arg-type]


class Knowing(FakeSession):
    """Knows the right answer to every position of the samples it was shown, but for those it gets wrong."""

    def __init__(self, samples: list[np.ndarray], wrong: list[np.ndarray], first_decoded: int) -> None:
        super().__init__(LIMITS, 64)
        self._texts, self._wrong, self._first_decoded = samples, wrong, first_decoded
        self.decoded: set[int] = set()

    def step(self, batch: StepBatch) -> FloatArray:
        logits = super().step(batch)
        for row in range(len(batch.past_length)):
            length = int(batch.past_length[row] + batch.query_start[row + 1] - batch.query_start[row])
            if batch.query_start[row + 1] - batch.query_start[row] == 1:
                self.decoded.add(length - 1)
            history = self._read(batch.page_table[row], length)[:, 0]
            for text in self._texts:
                if length < len(text) and np.array_equal(history, text[:length]):
                    right = not any(text is other for other in self._wrong)
                    logits[row] = -1
                    logits[row, text[length] if right else 0] = 1
        return logits


def test_who_knows_the_answers_scores_one_and_questions_are_decoded() -> None:
    wanted = options(("single", "multi-value", "multi-query"), vocabulary=Vocabulary(512))
    keys = [(task, index) for task in wanted.tasks for index in range(3)]
    samples = {key: make_sample(*key[:1], LENGTH, key[1], 0, wanted.vocabulary) for key in keys}
    texts = {key: sample.tokens for key, sample in samples.items()}
    wrong = [texts["single", 1], texts["multi-query", 0]]
    shortest = min(len(sample.context) for sample in samples.values())
    session = Knowing(list(texts.values()), wrong, shortest)
    results = {(r.task, r.index): r for r in answer_all(session, keys, wanted, Silent(), 64)}
    assert set(results) == set(keys)
    for key, result in results.items():
        assert result.score == (0 if key in (("single", 1), ("multi-query", 0)) else 1)
        if result.score == 1:
            assert result.generated == [turn.answer.tolist() for turn in samples[key].turns]
    # Contexts were prefilled, every token after them decoded, but for each answer's last, which is not fed.
    assert min(session.decoded) == shortest
    assert {LENGTH - 2} <= session.decoded


def test_a_step_that_fails_ends_the_evaluation() -> None:
    session = FakeSession(LIMITS, 64, fail_at=[2])
    with pytest.raises(RuntimeError, match="fell off"):
        list(answer_all(session, [("single", 0)], options(vocabulary=Vocabulary(512)), Silent(), 64))


def test_an_engine_answers_as_the_reference_does() -> None:
    """The engine's tokens, with sparse attention, are those of transformers with the SOCKET method; not the dense ones."""
    engine = EngineDirectory.open(tiny_engine())
    wanted = options(samples=4, length=256, tasks=("single", "multi-query"))
    found = {(r.task, r.index): r.generated for r in run_eval(engine, wanted, Silent(), None).results}
    model = load_model(engine)

    def budget(length: int, attention: Attention) -> OperatorAttributes:
        return SOCKET.attributes(attention.scale)

    socket = Choice(Socket(seed=SOCKET.seed), budget)
    differs = False
    with chosen_attention(model):
        for task in wanted.tasks:
            samples = [make_sample(task, 256, index, 0, VOCABULARY) for index in range(4)]
            decoder = Decoder(model, [sample.context for sample in samples], socket)
            assert decoder.answer(samples) == [found[task, index] for index in range(4)]
            decoder.choice = Choice(Dense(), budget)
            differs |= decoder.answer(samples) != [found[task, index] for index in range(4)]
    assert differs
    assert model.config._attn_implementation == "eager"


def test_dense_choice_is_transformers_own_attention() -> None:
    engine = EngineDirectory.open(tiny_engine())
    model = load_model(engine)
    sample = make_sample("single", 200, 0, 0, VOCABULARY)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(sample.tokens)[None].long()).logits[:, -1]
    with chosen_attention(model):
        decoder = Decoder(model, [sample.context], Choice(Dense(), Share(0.1, 4, 4)))
        observed: list[tuple[int, Attention]] = []
        decoder.observe = lambda layer, attention: observed.append((layer, attention))
        rest = torch.from_numpy(sample.tokens[len(sample.context) :])[None].long()
        torch.testing.assert_close(decoder.feed(rest), expected, atol=1e-4, rtol=1e-4)
        assert [layer for layer, _ in observed] == [0, 1] * rest.shape[1]
        assert [a.keys.shape[1] for _, a in observed[::2]] == list(range(len(sample.context) + 1, 201))
        decoder.rewind()
        decoder.choice = Choice(Random(), Share(0.1, 4, 4))
        assert (decoder.feed(rest) - expected).abs().max() > 1e-2


def test_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, output = EngineDirectory.open(tiny_engine()), tmp_path / "results.jsonl"
    whole = run_eval(engine, options(), Silent(), output)
    lines = output.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 6
    output.write_text("".join(lines[:3]) + lines[3][:20])  # two results, the third was cut off
    asked: list[list[tuple[str, int]]] = []
    original = evaluate.answer_all

    def spy(session, wanted, *rest):  # type: ignore[no-untyped-def]
        asked.append(list(wanted))
        return original(session, wanted, *rest)

    monkeypatch.setattr(evaluate, "answer_all", spy)
    again = run_eval(engine, options(), Silent(), output)
    assert again == whole
    kept = [SampleResult(**json.loads(line)) for line in lines[1:3]]
    assert sorted(asked[0]) == sorted({(r.task, r.index) for r in whole.results} - {(r.task, r.index) for r in kept})
    assert sorted(output.read_text().splitlines()[1:]) == sorted(line.strip() for line in lines[1:])
    # With everything there, nothing runs; more samples ask for no more than what is new.
    assert run_eval(engine, options(), Silent(), output) == whole
    assert len(asked) == 1
    run_eval(engine, options(samples=4), Silent(), output)
    assert sorted(asked[1]) == [("multi-query", 3), ("single", 3)]


def test_results_of_something_else_are_left_alone(tmp_path: Path) -> None:
    engine, output = EngineDirectory.open(tiny_engine()), tmp_path / "results.jsonl"
    run_eval(engine, options(samples=1), Silent(), output)
    before = output.read_bytes()
    with pytest.raises(ConfigError, match="another seed"):
        run_eval(engine, options(samples=1, seed=1), Silent(), output)
    assert output.read_bytes() == before
    for text in ("", "no JSON\n", "[]\n[]\n", "[]\n"):
        output.write_text(text)
        with pytest.raises(ConfigError, match="remove it to begin anew"):
            run_eval(engine, options(samples=1), Silent(), output)
        assert output.read_text() == text
    with pytest.raises(EngineError, match="cannot be written"):
        run_eval(engine, options(samples=1), Silent(), tmp_path / "no" / "results.jsonl")


def test_suites() -> None:
    assert parse_suite("all") == tuple(TASKS)
    assert parse_suite("single, haystack") == ("single", "haystack")
    for text in ("sigle", "", "single,"):
        with pytest.raises(ConfigError, match="unknown task"):
            parse_suite(text)
    with pytest.raises(ConfigError, match="twice"):
        parse_suite("single,single")


def test_command_line(run: Run, tmp_path: Path) -> None:  # noqa: F811
    arguments = ["eval", tiny_engine(), "--suite", "single,multi-query", "--length", LENGTH, "--samples", 2]
    shown = run(*arguments)
    assert shown.code == 0
    assert "multi-query" in shown.out
    assert "right answers are luck" in shown.err
    report = json.loads(run(*arguments, "--json", "--output", tmp_path / "r.jsonl").out)
    assert set(report["tasks"]) == {"single", "multi-query"}
    assert report["tasks"]["single"]["samples"] == 2
    assert 0 <= report["tasks"]["single"]["accuracy"] <= 1
    assert_one_line_error(run("eval", tiny_engine(), "--suite", "sigle"), "unknown task 'sigle'")
    assert_one_line_error(run("eval", tiny_engine(), "--suite", "single", "--length", 1024), "--max-seq-len")
    assert_one_line_error(run("eval", tiny_engine(), "--suite", "haystack", "--length", 500), "different keys")
