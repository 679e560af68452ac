"""One thread a test process: several of them share the machine."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import SHARED_VARIABLE

if TYPE_CHECKING:
    from tests.tensorrt_fixtures import FakeMachine


_SHARED: list[tempfile.TemporaryDirectory[str]] = []


def pytest_configure(config: pytest.Config) -> None:
    """A directory that all processes of this run share, made by the one that starts the others."""
    if not hasattr(config, "workerinput"):
        _SHARED.append(tempfile.TemporaryDirectory(prefix="socket-trt-test-"))
        os.environ[SHARED_VARIABLE] = _SHARED[0].name


def pytest_unconfigure() -> None:
    for directory in _SHARED:
        directory.cleanup()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeMachine]:
    """A machine whose TensorRT and GPU are fakes."""
    from socket_trt.engine.tensorrt import open_tensorrt
    from tests.tensorrt_fixtures import FakeMachine

    yield FakeMachine(monkeypatch, tmp_path)
    open_tensorrt.cache_clear()
