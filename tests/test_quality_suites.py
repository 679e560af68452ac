"""RULER and LongBench from small files written here: what is read, how answers are judged, and a whole evaluation."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import ConfigError, MissingDependencyError
from socket_trt.quality.evaluate_text import prepare
from socket_trt.quality.suites import metrics, read_suite
from socket_trt.quality.suites.longbench import METRICS, best
from socket_trt.runtime.open import load_tokenizer
from socket_trt.serving.chat import ChatTemplate
from tests.engines import tiny_engine
from tests.test_cli import Run, assert_one_line_error, run  # noqa: F401  (a fixture)

PROMPTS = {
    "hotpotqa": "Passages: {context}\nQuestion: {input}\nAnswer:",
    "trec": "{context}\n{input}",
    "lcc": "Code: {context}Next line:\n",
    "gov_report": "{context}\nSummary:",
}
LENGTHS = {"hotpotqa": 4, "trec": 3, "lcc": 5, "gov_report": 6}


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def longbench(folder: Path) -> Path:
    def sample(answers: list[str], classes: list[str] | None = None) -> dict[str, Any]:
        return {"input": "who {said} it", "context": "a {text} of words " * 4, "answers": answers, "all_classes": classes,
                "length": 9, "dataset": "x", "language": "en", "_id": "1"}  # fmt: skip

    write_lines(folder / "data/hotpotqa.jsonl", sample(["The cat"]), sample(["a dog", "the Wolf"]))
    write_lines(folder / "data/trec_e.jsonl", sample(["Number"], ["Number", "Number of days", "City"]))
    write_lines(folder / "data/lcc.jsonl", sample(["x = 1"]))
    write_lines(folder / "data/gov_report.jsonl", sample(["one two three"]))
    for name, content in (("dataset2prompt", PROMPTS), ("dataset2maxlen", LENGTHS)):
        (folder / "config").mkdir(exist_ok=True)
        (folder / f"config/{name}.json").write_text(json.dumps(content))
    return folder / "data"


def ruler(folder: Path) -> Path:
    write_lines(
        folder / "niah_multivalue/validation.jsonl",
        {"index": 0, "input": "Many words.\nWhat are the numbers?", "outputs": ["12", "345"], "length": 30,
         "answer_prefix": " They are"},
        {"index": 1, "input": "Other words.\nWhat are the numbers?", "outputs": ["7"], "length": 30},
    )  # fmt: skip
    write_lines(
        folder / "qa_1.jsonl", {"index": 0, "input": "Documents.\n\nWho?", "outputs": ["Ann", "Anna"], "length": 9}
    )
    return folder


def test_ruler(tmp_path: Path) -> None:
    first, second, qa = read_suite("ruler", ruler(tmp_path), 10)
    assert [(i.task, i.index, i.max_tokens) for i in (first, second, qa)] == [
        ("niah_multivalue", 0, 128), ("niah_multivalue", 1, 128), ("qa_1", 0, 32),
    ]  # fmt: skip
    assert first.prompt[first.question :] == "What are the numbers? They are"
    assert qa.prompt[qa.question :] == "Who?"
    assert [first.score(text) for text in ("12 and 345", "345", "", "1 2 34 5")] == [1, 0.5, 0, 0]
    assert [qa.score(text) for text in ("it was ANN", "Anna", "Bob")] == [1, 1, 0]
    assert len(read_suite("ruler", tmp_path, 1)) == 2
    assert [i.task for i in read_suite("ruler", tmp_path / "qa_1.jsonl", 9)] == ["qa_1"]
    one_line = "words " * 100
    write_lines(tmp_path / "one/niah_1.jsonl", {"input": one_line, "outputs": ["1"]})
    (item,) = read_suite("ruler", tmp_path / "one", 1)
    assert 0 < item.question < len(one_line)


def test_longbench(tmp_path: Path) -> None:
    items = {(i.task, i.index): i for i in read_suite("longbench", longbench(tmp_path), 10)}
    assert set(items) == {("hotpotqa", 0), ("hotpotqa", 1), ("trec_e", 0), ("lcc", 0), ("gov_report", 0)}
    hotpot = items["hotpotqa", 1]
    assert hotpot.prompt == "Passages: " + "a {text} of words " * 4 + "\nQuestion: who {said} it\nAnswer:"
    assert hotpot.prompt[hotpot.question :] == "\nQuestion: who {said} it\nAnswer:"
    assert hotpot.score("Wolf!") == 1
    assert hotpot.score("a big dog") == pytest.approx(2 * 1 / (2 + 1))  # articles do not count
    assert (hotpot.chat, items["lcc", 0].chat, items["trec_e", 0].chat) == (True, False, False)
    assert items["trec_e", 0].score("\nNumber\nNumber of days") == 1  # the first line alone
    assert items["trec_e", 0].max_tokens == LENGTHS["trec"]


def test_metrics() -> None:
    assert metrics.qa_f1("The quick, brown fox", "quick fox jumps") == pytest.approx(2 * 2 / (3 + 3))
    assert metrics.qa_f1("", "x") == 0
    assert metrics.qa_f1_zh("北京，中国。", "北京 中国") == 1
    assert metrics.rouge_l("the cat sat", "the cat sat") == pytest.approx(1, abs=1e-6)
    # Longest common subsequence "a c": 2 of 3 words on either side.
    assert metrics.rouge_l("a b c", "a c d") == pytest.approx(2 / 3, abs=1e-6)
    assert metrics.rouge_l("", "a") == metrics.rouge_l(".", "a") == 0
    assert metrics.rouge_l_zh("今天天气很好", "今天天气很好") == pytest.approx(1, abs=1e-6)
    classes = ["Date", "City", "City state", "Number"]
    assert metrics.classification("City state", "City state", classes) == 1  # "City" is part of the right one
    assert metrics.classification("Date or Number", "Number", classes) == 0.5
    assert metrics.classification("nothing", "Number", classes) == 0
    assert metrics.retrieval("Paragraph 12, not 3", "Paragraph 12") == 0.5
    assert metrics.retrieval("段落3", "段落3") == 1
    assert metrics.count("there are 7, 7 or 8", "7") == pytest.approx(2 / 3)
    assert metrics.count("none", "7") == 0
    assert metrics.code_similarity("\n# first\n```\nx = 1\ny", "x = 1") == 1
    assert metrics.code_similarity("x = 2", "x = 1") == 0.8  # four of five characters either way
    assert metrics.code_similarity("# no code", "x") == 0
    assert best("a dog", dataset="hotpotqa", references=["cat", "dog"], classes=()) == 1
    assert best("x", dataset="hotpotqa", references=[], classes=()) == 0
    assert len(METRICS) == 21


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(MissingDependencyError, match="rouge"):
        metrics.rouge_l("a", "a")


def test_what_is_no_suite(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no samples of RULER"):
        read_suite("ruler", tmp_path, 1)
    write_lines(tmp_path / "poetry.jsonl", {"input": "x", "outputs": []})
    with pytest.raises(ConfigError, match="'poetry' is no task of RULER"):
        read_suite("ruler", tmp_path, 1)
    with pytest.raises(ConfigError, match="folder config"):
        read_suite("longbench", tmp_path, 1)
    write_lines(tmp_path / "qa_1.jsonl", {"input": "x"})
    with pytest.raises(ConfigError, match="no field 'outputs'"):
        read_suite("ruler", tmp_path / "qa_1.jsonl", 1)
    (tmp_path / "qa_1.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="JSON lines"):
        read_suite("ruler", tmp_path / "qa_1.jsonl", 1)
    data = longbench(tmp_path / "l")
    (data / "lcc.jsonl").rename(data / "poems.jsonl")
    with pytest.raises(ConfigError, match="'poems' is no dataset of LongBench"):
        read_suite("longbench", data, 1)


def test_questions_are_decoded_and_what_is_too_long_loses_its_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineDirectory.open(tiny_engine())
    tokenizer = load_tokenizer(engine)
    (item, *_) = read_suite("longbench", longbench(tmp_path), 1)
    assert item.task == "gov_report"
    tokens, decoded = prepare(item, tokenizer, engine, chat=False)
    assert tokenizer.decode(tokens[-decoded:]) == "\nSummary:"

    long = dataclasses.replace(item, prompt="x" * 1000 + item.prompt, question=1000 + item.question)
    cut, still = prepare(long, tokenizer, engine, chat=False)
    assert len(cut) == engine.manifest.max_seq_len - item.max_tokens
    assert cut[-50:] == tokens[-50:]
    assert still == decoded
    with pytest.raises(ConfigError, match="larger --max-seq-len"):
        prepare(dataclasses.replace(long, shorten=False), tokenizer, engine, chat=False)
    monkeypatch.setattr(ChatTemplate, "of", lambda engine: None)
    with pytest.raises(ConfigError, match="no chat template"):
        prepare(item, tokenizer, engine, chat=True)


def test_the_chat_form_decodes_the_question_too(tmp_path: Path) -> None:
    shutil.copytree(tiny_engine(), tmp_path / "engine")
    (tmp_path / "engine/chat_template.jinja").write_text("<user>{{ messages[0]['content'] }}<model>")
    engine = EngineDirectory.open(tmp_path / "engine")
    tokenizer = load_tokenizer(engine)
    item = next(i for i in read_suite("longbench", longbench(tmp_path), 1) if i.task == "hotpotqa")
    tokens, decoded = prepare(item, tokenizer, engine, chat=True)
    assert tokenizer.decode(tokens) == f"<user>{item.prompt}<model>"
    assert tokenizer.decode(tokens[-decoded:]) == "Question: who {said} it\nAnswer:<model>"


def test_command_line(run: Run, tmp_path: Path) -> None:  # noqa: F811
    data, output = longbench(tmp_path), tmp_path / "results.jsonl"
    arguments = ["eval", tiny_engine(), "--suite", "longbench", "--data", data, "--output", output, "--json"]
    first = run(*arguments)
    assert first.code == 0, first.err
    report = json.loads(first.out)
    assert {task: found["samples"] for task, found in report["tasks"].items()} == {
        "gov_report": 1, "hotpotqa": 2, "lcc": 1, "trec_e": 1,
    }  # fmt: skip
    lines = output.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 5
    kept = json.loads(lines[1])
    assert kept["text"] is not None
    output.write_text("".join(lines[:3]))  # it goes on where it was interrupted
    assert json.loads(run(*arguments).out) == report
    assert sorted(output.read_text().splitlines()) == sorted(line.strip() for line in lines)
    shown = run("eval", tiny_engine(), "--suite", "ruler", "--data", ruler(tmp_path / "ruler"), "--samples", 1)
    assert "niah_multivalue" in shown.out
    assert_one_line_error(run("eval", tiny_engine(), "--suite", "ruler"), "give --data")
    assert_one_line_error(run("eval", tiny_engine(), "--suite", "single", "--data", data), "for a suite of texts")
    changed = ["eval", tiny_engine(), "--suite", "longbench", "--data", data, "--output", output, "--samples", "1"]
    assert_one_line_error(run(*changed), "another data")
