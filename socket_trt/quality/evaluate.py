"""Task accuracy of a session: contexts prefilled, questions decoded, answers generated greedily and scored.

The question is computed in decode rows, as the answer is: were it prefilled, an answer's first token would come from dense
attention.  Of several turns each is asked after the right answers of those before it.  Results go to a file sample
by sample, so that an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.engine.profiles import DEFAULT_MAX_STEP_TOKENS
from socket_trt.errors import ConfigError, EngineError
from socket_trt.progress import Progress
from socket_trt.quality.tasks import TASKS, Sample, make_sample, score
from socket_trt.quality.vocabulary import Vocabulary
from socket_trt.runtime.open import max_step_tokens, open_session
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import Scheduler, TokenEvent
from socket_trt.runtime.session import Session

Key = TypeVar("Key")

ALL = "all"


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """What is asked: `samples` of each task, of `length` tokens in all."""

    tasks: tuple[str, ...]
    length: int
    samples: int
    seed: int
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        """Make one sample of each task, so that what cannot be made is known before any model runs."""
        for task in self.tasks:
            make_sample(task, self.length, 0, self.seed, self.vocabulary)


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """score: mean of its turns'; generated: token ids of each turn; text: of a suite of texts, what they say."""

    task: str
    index: int
    score: float
    generated: list[list[int]]
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class EvalReport:
    about: dict[str, Any]
    results: list[SampleResult]

    def accuracy(self, task: str) -> float:
        """Mean score of a task's samples."""
        return float(np.mean([result.score for result in self.results if result.task == task]))

    def as_dict(self) -> dict[str, Any]:
        tasks = dict.fromkeys(result.task for result in self.results)
        summary = {
            task: {"accuracy": self.accuracy(task), "samples": sum(result.task == task for result in self.results)}
            for task in tasks
        }
        return {**self.about, "tasks": summary}


def parse_suite(text: str) -> tuple[str, ...]:
    """Names of tasks, separated by commas, or `all`.  Raises ConfigError for an unknown or repeated one."""
    names = tuple(TASKS) if text == ALL else tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ConfigError(f"--suite {text}: unknown task '{unknown[0]}': give {ALL}, or some of {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--suite {text}: a task is named twice")
    return names


def run_eval(engine: EngineDirectory, options: EvalOptions, progress: Progress, output: Path | None) -> EvalReport:
    """Evaluate an engine; `output` is the file of results, which is gone on with where it exists.

    Raises ConfigError where the engine does not hold sequences of that length, or `output` is of another evaluation.
    """
    manifest = engine.manifest
    if options.length > manifest.max_seq_len:
        raise ConfigError(
            f"--length {options.length}: this engine holds {manifest.max_seq_len} tokens a sequence; evaluate shorter "
            "ones, or build it with a larger --max-seq-len"
        )
    about = {
        **about_engine(engine),
        "length": options.length,
        "seed": options.seed,
        "vocabulary": dataclasses.asdict(options.vocabulary),
    }
    wanted = [(task, index) for task in options.tasks for index in range(options.samples)]

    def answer(session: Session, missing: Sequence[tuple[str, int]]) -> Iterable[SampleResult]:
        return answer_all(session, missing, options, progress, max_step_tokens(engine))

    return resumed(engine, about, wanted, answer, progress, output)


def about_engine(engine: EngineDirectory) -> dict[str, Any]:
    """What results depend on besides the questions."""
    manifest = engine.manifest
    return {
        "model": manifest.model.name,
        "graph": manifest.graph.sha256,
        "weights": sorted(record.sha256 for record in manifest.weights.files.values()),
        "backend": manifest.backend,
        "attention": manifest.attention.value,
        "dtype": manifest.dtype,
        "socket": manifest.socket.model_dump(mode="json"),
    }


def resumed(
    engine: EngineDirectory,
    about: dict[str, Any],
    wanted: Sequence[tuple[str, int]],
    answer: Callable[[Session, Sequence[tuple[str, int]]], Iterable[SampleResult]],
    progress: Progress,
    output: Path | None,
) -> EvalReport:
    """The results of all `wanted` (task, index): those that `output` has, and those that `answer` yields of the others."""
    done = _read(output, about) if output is not None and output.exists() else []
    have = {(result.task, result.index): result for result in done}
    missing = [key for key in wanted if key not in have]
    if missing:
        session = open_session(engine, progress=progress)
        try:
            with _sink(output, about) as file:
                for result in answer(session, missing):
                    have[result.task, result.index] = result
                    file.write(json.dumps(dataclasses.asdict(result)) + "\n")
                    file.flush()
        finally:
            session.close()
    return EvalReport(about, [have[key] for key in wanted])


def answer_all(
    session: Session,
    wanted: Sequence[tuple[str, int]],
    options: EvalOptions,
    progress: Progress,
    step_tokens: int = DEFAULT_MAX_STEP_TOKENS,
) -> Iterable[SampleResult]:
    """Yield the result of each wanted (task, index) as it is ready; the session's batch is kept full.

    Raises what the session raised where a step failed.
    """
    scheduler = Scheduler(session, max_step_tokens=step_tokens)
    asked: dict[int, tuple[_Open, int]] = {}  # by request: a sample and a turn of it

    def submit(key: tuple[str, int]) -> None:
        sample = _Open(*key, make_sample(key[0], options.length, key[1], options.seed, options.vocabulary))
        asked.update({sample.ask(scheduler, turn): (sample, turn) for turn in range(len(sample.sample.turns))})

    with progress.task(f"Answering {len(wanted)} samples of {options.length} tokens", len(wanted)) as advance:
        for event, token in generated(scheduler, session.limits.max_batch_size, wanted, submit):
            sample, turn = asked[event.request_id]
            sample.generated[turn].append(token)
            if event.finish_reason is not None:
                del asked[event.request_id]
                sample.turns_left -= 1
                if not sample.turns_left:
                    yield sample.result()
                    advance(1)


def generated(
    scheduler: Scheduler, batch: int, wanted: Iterable[Key], submit: Callable[[Key], None]
) -> Iterator[tuple[TokenEvent, int]]:
    """Yield every event of the requests that `submit` makes of `wanted`, and its token; `batch` requests are kept queued.

    Raises what the session raised where a step failed.
    """
    queue = iter(wanted)
    while True:
        while scheduler.queue_length < batch and (key := next(queue, None)) is not None:
            submit(key)
        if scheduler.idle:
            return
        for event in scheduler.step():
            if event.error is not None:
                raise event.error
            assert event.token is not None
            yield event, event.token


class _Open:
    """A sample whose turns are being answered."""

    def __init__(self, task: str, index: int, sample: Sample) -> None:
        self.task, self.index, self.sample = task, index, sample
        self.generated: list[list[int]] = [[] for _ in sample.turns]
        self.turns_left = len(sample.turns)

    def ask(self, scheduler: Scheduler, turn: int) -> int:
        """Submit a turn, after the right answers of the earlier ones; the request's id."""
        *before, last = self.sample.turns[: turn + 1]
        asked = [part for earlier in before for part in (earlier.question, earlier.answer)] + [last.question]
        prompt = np.concatenate([self.sample.context, *asked])
        parameters = SamplingParameters(max_tokens=len(last.answer), ignore_eos=True)
        return scheduler.submit(prompt.tolist(), parameters, decoded=len(prompt) - len(self.sample.context))

    def result(self) -> SampleResult:
        scores = [score(turn, tokens) for turn, tokens in zip(self.sample.turns, self.generated, strict=True)]
        return SampleResult(self.task, self.index, float(np.mean(scores)), self.generated)


def _sink(output: Path | None, about: dict[str, Any]) -> TextIO:
    """Where results go, one line each, after a line that says of what.  Raises EngineError where it cannot be written."""
    path = Path(os.devnull) if output is None else output
    try:
        fresh = output is not None and not path.exists()
        file = path.open("a", encoding="utf-8")
        if fresh:
            file.write(json.dumps(about) + "\n")
            file.flush()
        return file
    except OSError as error:
        raise EngineError(f"{path}: cannot be written ({error.strerror})") from None


def _read(output: Path, about: dict[str, Any]) -> list[SampleResult]:
    """The results in a file.  A last line that was cut off is dropped from it.

    Raises ConfigError where it is none of this evaluation.
    """
    refusal = "give another --output, or remove it to begin anew"
    try:
        text = output.read_text(encoding="utf-8")
        head, *lines = text[: text.rindex("\n") + 1].splitlines()
        found = json.loads(head)
        results = [SampleResult(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError):
        raise ConfigError(f"{output}: not a file of evaluation results; {refusal}") from None
    different = [name for name, value in about.items() if not isinstance(found, dict) or found.get(name) != value]
    if different:
        raise ConfigError(f"{output}: results of an evaluation with another {different[0]}; {refusal}")
    if not text.endswith("\n"):
        output.write_text(text[: text.rindex("\n") + 1], encoding="utf-8")
    return results
