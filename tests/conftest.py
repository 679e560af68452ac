"""One thread a test process: several of them share the machine."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.tensorrt_fixtures import FakeMachine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeMachine]:
    """A machine whose TensorRT and GPU are fakes."""
    from socket_trt.engine.tensorrt import open_tensorrt
    from tests.tensorrt_fixtures import FakeMachine

    yield FakeMachine(monkeypatch, tmp_path)
    open_tensorrt.cache_clear()
