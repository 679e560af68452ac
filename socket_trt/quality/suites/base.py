"""What the suites share: an item to answer, and reading JSON lines."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from socket_trt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TextItem:
    """A text, and how what follows it is judged.

    question   where in the prompt the question begins, in characters: it is decoded, as the answer is, what comes before
               is prefilled
    max_tokens of the answer
    score      of an answer's text, 0 to 1
    shorten    leave out of the middle what an engine has no room for, as the suite itself does; else it is refused
    chat       whether the suite gives this task to chat models in their chat form
    """

    task: str
    index: int
    prompt: str
    question: int
    max_tokens: int
    score: Callable[[str], float]
    shorten: bool = False
    chat: bool = True


def json_lines(path: Path, fields: tuple[str, ...], count: int) -> Iterator[dict[str, Any]]:
    """The first `count` objects of a file, each with at least these fields.  Raises ConfigError for anything else."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in itertools.islice(enumerate(filter(str.strip, file), 1), count):
                found = json.loads(line)
                missing = [name for name in fields if not isinstance(found, dict) or name not in found]
                if missing:
                    raise ConfigError(
                        f"{path}: sample {number} has no field '{missing[0]}'; expected {', '.join(fields)}"
                    )
                yield found
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path}: not a file of JSON lines") from None


def data_files(data: Path, patterns: tuple[str, ...], what: str) -> list[Path]:
    """`data` itself where it is a file, else those of its files that match.  Raises ConfigError where there are none."""
    if data.is_file():
        return [data]
    found = sorted(path for pattern in patterns for path in data.glob(pattern))
    if not found:
        raise ConfigError(f"--data {data}: holds no {what}: expected {' or '.join(patterns)}")
    return found
