"""LongBench's samples as published: JSON lines with `input`, `context`, `answers`, `all_classes`, a file a dataset.

What is asked around them, and how long an answer may be, LongBench keeps in `dataset2prompt.json` and `dataset2maxlen.json`
of its own repository; both are read from there: beside the samples, or in a folder `config` there or one level up.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from socket_trt.errors import ConfigError
from socket_trt.quality.suites import metrics
from socket_trt.quality.suites.base import TextItem, data_files, json_lines
from socket_trt.quality.suites.metrics import Metric

METRICS: dict[str, Metric] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), metrics.qa_f1
    ),
    "multifieldqa_zh": metrics.qa_f1_zh,
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), metrics.rouge_l),
    **dict.fromkeys(("dureader", "vcsum"), metrics.rouge_l_zh),
    **dict.fromkeys(("trec", "lsht"), metrics.classification),
    **dict.fromkeys(("passage_retrieval_en", "passage_retrieval_zh"), metrics.retrieval),
    "passage_count": metrics.count,
    **dict.fromkeys(("lcc", "repobench-p"), metrics.code_similarity),
}
# Examples come before the question, and an answer ends with its line.
_ONE_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
# To be continued rather than answered: no chat form.
_PLAIN = _ONE_LINE | {"lcc", "repobench-p"}
_CONTEXT = "{context}"


def read_longbench(data: Path, samples: int) -> list[TextItem]:
    """Raises ConfigError where samples, prompts or lengths are missing, or a file is of no known dataset."""
    files = data_files(data, ("*.jsonl",), "samples of LongBench")
    folder = data if data.is_dir() else data.parent
    prompts, lengths = (_configuration(folder, name) for name in ("dataset2prompt.json", "dataset2maxlen.json"))
    items = []
    for path in files:
        dataset = path.stem.removesuffix("_e")
        for known, where in (
            (METRICS, "LongBench"),
            (prompts, "dataset2prompt.json"),
            (lengths, "dataset2maxlen.json"),
        ):
            if dataset not in known:
                raise ConfigError(f"{path}: '{dataset}' is no dataset of {where}: it has {', '.join(known)}")
        before, _, after = prompts[dataset].partition(_CONTEXT)
        for index, sample in enumerate(json_lines(path, ("input", "context", "answers", "all_classes"), samples)):
            context, question = (_fill(part, sample) for part in (before + _CONTEXT, after))
            score = functools.partial(
                best, dataset=dataset, references=list(sample["answers"]), classes=list(sample["all_classes"] or ())
            )
            if not index:
                score("0")  # a package that the metric lacks is missed now, not after the first answer
            items.append(
                TextItem(
                    path.stem, index, context + question, len(context), int(lengths[dataset]), score,
                    shorten=True, chat=dataset not in _PLAIN,
                )
            )  # fmt: skip
    return items


def best(answer: str, *, dataset: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """The dataset's metric with the reference that suits the answer best."""
    if dataset in _ONE_LINE:
        answer = metrics.first_line(answer)
    return max((METRICS[dataset](answer, reference, classes) for reference in references), default=0.0)


def _fill(template: str, sample: dict[str, Any]) -> str:
    return template.format(context=sample["context"], input=sample["input"])


def _configuration(folder: Path, name: str) -> dict[str, Any]:
    for place in (folder, folder / "config", folder.parent / "config"):
        if (place / name).is_file():
            try:
                return dict(json.loads((place / name).read_text(encoding="utf-8")))
            except ValueError:
                raise ConfigError(f"{place / name}: not a JSON object; copy LongBench's own again") from None
    raise ConfigError(f"--data {folder}: {name} is missing: copy LongBench's folder config there")
