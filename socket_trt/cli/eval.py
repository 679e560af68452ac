"""`socket-trt eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from socket_trt.cli.console import RichProgress, err, out, table
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import ConfigError
from socket_trt.quality.evaluate import ALL, EvalOptions, EvalReport, parse_suite, run_eval
from socket_trt.quality.evaluate_text import run_text_eval
from socket_trt.quality.suites import SUITES, read_suite
from socket_trt.quality.tasks import TASKS
from socket_trt.quality.vocabulary import Vocabulary


def eval_(
    directory: Annotated[Path, typer.Argument(help="Engine directory.")],
    suite: Annotated[
        str,
        typer.Option(
            help=f"Tasks, separated by commas, or {ALL}: {', '.join(TASKS)}; or a suite of texts: {', '.join(SUITES)}."
        ),
    ] = ALL,
    data: Annotated[Path | None, typer.Option(help="Where the samples of a suite of texts are.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Give a suite's questions in the engine's chat template.")
    ] = False,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sample: context, questions and answers.")] = 512,
    samples: Annotated[int, typer.Option(min=1, help="Of each task.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the samples.")] = 0,
    key_tokens: Annotated[int, typer.Option(help="Tokens of a key.")] = 1,
    value_tokens: Annotated[int, typer.Option(help="Tokens of a value.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="File for each sample's result, one line of JSON each; goes on where it exists.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the accuracies as JSON.")] = False,
) -> None:
    """Answer questions about long contexts whose answers are known, and report the share that was right.

    The tasks are written in tokens, not text: only a model trained on them (benchmarks/train_retriever.py) can answer.  RULER
    and LongBench are read from --data as their projects publish them; the first --samples of each file are answered.
    """
    engine = EngineDirectory.open(directory)
    if suite in SUITES:
        if data is None:
            raise ConfigError(f"--suite {suite}: give --data, the folder or file of its samples")
        items = read_suite(suite, data, samples)
        _print(run_text_eval(engine, suite, items, chat, RichProgress(), output), directory, suite, engine, as_json)
        return
    if data is not None or chat:
        raise ConfigError(f"--data and --chat are for a suite of texts: {', '.join(SUITES)}")
    manifest = engine.manifest
    vocabulary = Vocabulary(manifest.model.vocabulary_size, key_tokens, value_tokens)
    options = EvalOptions(parse_suite(suite), length, samples, seed, vocabulary)
    report = run_eval(engine, options, RichProgress(), output)
    _print(report, directory, f"{length} tokens", engine, as_json)


def _print(report: EvalReport, directory: Path, what: str, engine: EngineDirectory, as_json: bool) -> None:
    if as_json:
        out.print_json(data=report.as_dict())
        return
    manifest = engine.manifest
    rows = [
        (task, str(found["samples"]), f"{found['accuracy']:.1%}", TASKS[task].description if task in TASKS else "")
        for task, found in report.as_dict()["tasks"].items()
    ]
    title = f"{directory}: {manifest.model.name}, {manifest.dtype}, {manifest.attention.value}, {what}"
    out.print(table(title, ("task", "samples", "right", "what"), rows))
    if manifest.model.random_weights:
        err.print("[dim]the weights are random, so right answers are luck[/]")
