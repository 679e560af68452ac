"""What a tuner measures on: prompts whose last tokens are decode queries, from a user's file or from the synthetic tasks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import ConfigError
from socket_trt.quality.tasks import TASKS, Sample, make_sample
from socket_trt.quality.vocabulary import Tokens, Vocabulary
from socket_trt.runtime.open import load_tokenizer

TRAINING_FILE = "training.json"  # beside a checkpoint that benchmarks/train_retriever.py wrote
ANSWERED = 0.95
PROMPTS = "prompts"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Tokens of which the last `decoded` are computed one by one, attending sparsely; the others are prefilled."""

    tokens: Tokens
    decoded: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Prompts of one kind, whose target is held each for itself; `samples` where their right answers are known."""

    name: str
    prompts: tuple[Prompt, ...]
    samples: tuple[Sample, ...] = ()

    @property
    def lengths(self) -> list[int]:
        return [len(prompt.tokens) for prompt in self.prompts]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training.json says of a model trained on the tasks: those it answers, at how many tokens."""

    vocabulary: Vocabulary
    length: int
    tasks: tuple[str, ...]


def trained_on_tasks(engine: EngineDirectory) -> Trained | None:
    """None where the engine's checkpoint is none that was trained on the tasks."""
    path = engine.checkpoint_directory / TRAINING_FILE
    if not path.is_file():
        return None
    about = json.loads(path.read_text(encoding="utf-8"))
    answered = tuple(task for task, right in about["accuracy"].items() if right >= ANSWERED and task in TASKS)
    return Trained(Vocabulary(**about["vocabulary"]), about["length"], answered)


def task_groups(
    tasks: Sequence[str], length: int, first: int, count: int, seed: int, vocabulary: Vocabulary
) -> list[Group]:
    """Samples `first` ... `first + count - 1` of each task, a group a task."""
    groups = []
    for task in tasks:
        samples = tuple(make_sample(task, length, first + i, seed, vocabulary) for i in range(count))
        prompts = tuple(Prompt(s.tokens, len(s.tokens) - len(s.context)) for s in samples)
        groups.append(Group(task, prompts, samples))
    return groups


def read_prompts(path: Path, engine: EngineDirectory, queries: int) -> list[Prompt]:
    """Prompts of a file: JSON lines, each a text or an object with the text as `prompt`.

    The last `queries` tokens of each are its decode queries.  Raises ConfigError for a file that is none, for fewer than
    two prompts, and for one that is too short or too long for the engine.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = [_text(json.loads(line)) for line in lines]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f'{path}: not a file of prompts: give JSON lines, each a text or {{"prompt": "a text"}}'
        ) from None
    if len(texts) < 2:
        raise ConfigError(
            f"{path}: {len(texts)} prompts; at least two are needed, to choose on some and to check on others"
        )
    tokenizer, limit = load_tokenizer(engine), engine.manifest.max_seq_len
    prompts = []
    for number, text in enumerate(texts, 1):
        tokens = np.array(tokenizer.encode(text).ids, np.int32)
        if not 2 * queries <= len(tokens) <= limit:
            raise ConfigError(
                f"{path}: prompt {number} has {len(tokens)} tokens; give prompts of {2 * queries} (twice --queries) to "
                f"{limit} (what this engine holds)"
            )
        prompts.append(Prompt(tokens, queries))
    return prompts


def _text(line: Any) -> str:
    text = line["prompt"] if isinstance(line, dict) else line
    if not isinstance(text, str):
        raise TypeError
    return text
