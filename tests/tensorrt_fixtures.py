"""Puts a fake TensorRT on a fake GPU in the places where the project looks for real ones."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from socket_trt.engine.compile import compile_engine
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.progress import Silent
from socket_trt.runtime import cuda
from tests.engines import tiny_engine
from tests.fake_cuda import FakeDriver
from tests.fake_tensorrt import FakeTensorRT

OPTIONS = {"dtype": "float16", "backend": "tensorrt", "max_batch_size": 4, "opset": 17}


@dataclasses.dataclass(frozen=True)
class FakePlugin:
    """As `socket_trt.engine.plugin.LoadedPlugin`."""

    path: Path = Path("libsocket_trt_plugin_8.so")
    sha256: str = "0" * 64
    release: str = "0.1.0"
    cublas: str | None = None


class FakeMachine:
    """Changes what the machine has; undone at the end of the test (fixture `machine`)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self._monkeypatch, self._tmp_path = monkeypatch, tmp_path
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr("socket_trt.runtime.tensorrt_session.RESERVE_BYTES", 0)

    def install(self, version: str = "8.6.0", plugin: FakePlugin | None = None, **driver: Any) -> FakeTensorRT:
        """TensorRT `version` on a GPU of `FakeDriver(**driver)`."""
        from socket_trt.engine.tensorrt import open_tensorrt

        fake_driver = FakeDriver(**driver)
        trt = FakeTensorRT(fake_driver, version)
        self._monkeypatch.setattr(cuda, "driver", fake_driver)
        self._monkeypatch.setitem(sys.modules, "tensorrt", trt)
        self._monkeypatch.setattr("socket_trt.engine.plugin.load_plugin", lambda *_: plugin or FakePlugin())
        open_tensorrt.cache_clear()
        return trt

    def compiled(self, **options: Any) -> EngineDirectory:
        """An engine of `tiny` with its plan, in a directory of the test's own."""
        directory = self._tmp_path / "engine"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tiny_engine(**OPTIONS | options), directory)
        compile_engine(EngineDirectory.open(directory), Silent())
        return EngineDirectory.open(directory)
