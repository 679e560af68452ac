"""RULER's samples as its generators write them: JSON lines with `input`, `outputs` and, in newer ones, `answer_prefix`.

A file lies in a folder named as its task (`niah_single_1/validation.jsonl`) or is named so itself (`niah_single_1.jsonl`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from socket_trt.errors import ConfigError
from socket_trt.quality.suites.base import TextItem, data_files, json_lines
from socket_trt.quality.suites.metrics import string_match_all, string_match_part

_SUBSETS = ("validation", "test")
# How the name of a task begins: tokens of its answer, its metric.
_KINDS: dict[str, tuple[int, Callable[[str, Sequence[str]], float]]] = {
    "niah": (128, string_match_all),
    "vt": (30, string_match_all),
    "variable_tracking": (30, string_match_all),
    "cwe": (120, string_match_all),
    "common_words": (120, string_match_all),
    "fwe": (50, string_match_all),
    "freq_words": (50, string_match_all),
    "qa": (32, string_match_part),
}
# Characters that are decoded where a text has no line of its own for the question.
_TAIL = 256


def read_ruler(data: Path, samples: int) -> list[TextItem]:
    """Raises ConfigError where there is no file of samples, or one is of no known task."""
    items = []
    for path in data_files(data, (*(f"*/{name}.jsonl" for name in _SUBSETS), "*.jsonl"), "samples of RULER"):
        task = path.parent.name if path.stem in _SUBSETS else path.stem
        kind = next((kind for kind in _KINDS if task.startswith(kind)), None)
        if kind is None:
            raise ConfigError(f"{path}: '{task}' is no task of RULER: its name begins with {', '.join(_KINDS)}")
        tokens, metric = _KINDS[kind]
        for index, sample in enumerate(json_lines(path, ("input", "outputs"), samples)):
            text, outputs = sample["input"], list(sample["outputs"])
            prompt = text + sample.get("answer_prefix", "")
            items.append(TextItem(task, index, prompt, _question(text), tokens, _scorer(metric, outputs)))
    return items


def _scorer(metric: Callable[[str, Sequence[str]], float], references: Sequence[str]) -> Callable[[str], float]:
    return lambda answer: metric(answer, references)


def _question(text: str) -> int:
    """Where the last line begins: all of RULER's questions are one."""
    line = text.rstrip().rfind("\n") + 1
    return line or max(1, len(text) - _TAIL)
