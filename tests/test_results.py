"""The recorded tables say what the recorded figures are."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import attention, decode, layers, traffic
from socket_trt.benchmark import BenchReport

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("benchmark", "name"),
    [
        (attention, "attention-h100"),
        (attention, "attention-h200"),
        (layers, "layers-h200"),
        (traffic, "traffic-h200"),
    ],
)
def test_tables_are_those_of_the_figures(benchmark: ModuleType, name: str) -> None:
    results = json.loads((RESULTS / f"{name}.json").read_text())
    assert benchmark.table(results) == (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize("name", ["decode-h100", "decode-h200"])
def test_decode_tables_are_those_of_the_reports(name: str) -> None:
    reports = [BenchReport.from_dict(fields) for fields in json.loads((RESULTS / f"{name}.json").read_text())]
    assert decode.table(reports) == (RESULTS / f"{name}.md").read_text()


def test_table_compares_the_operator_behind_itself_and_behind_others() -> None:
    results = json.loads((RESULTS / "attention-h200.json").read_text())
    row = {"batch": 1, "length": 32768}
    times = {"socket_us": 29.1, "socket_behind_us": 32.1, "dense_us": 41.5, "dense_behind_us": 41.6}
    text = attention.table(results | {"behind": [row | times]})
    assert text.endswith("\n| 1 | 32K | 29.1 | 32.1 | 41.5 | 41.6 |\n")
