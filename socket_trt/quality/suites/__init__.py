"""Benchmarks of texts that a user has on disk: RULER and LongBench, with their own metrics."""

from __future__ import annotations

from pathlib import Path

from socket_trt.quality.suites.base import TextItem
from socket_trt.quality.suites.longbench import read_longbench
from socket_trt.quality.suites.ruler import read_ruler

__all__ = ["SUITES", "TextItem", "read_suite"]

SUITES = {"ruler": read_ruler, "longbench": read_longbench}


def read_suite(name: str, data: Path, samples: int) -> list[TextItem]:
    """The first `samples` of every task of a suite.  Raises ConfigError where `data` does not hold it."""
    return SUITES[name](data, samples)
