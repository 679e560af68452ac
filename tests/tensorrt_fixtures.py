"""A fake TensorRT on a fake GPU in the places where the project looks for real ones."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from socket_trt.engine import tensorrt as opening
from socket_trt.runtime import cuda
from tests.fake_cuda import FakeDriver
from tests.fake_tensorrt import FakeTensorRT


@dataclasses.dataclass(frozen=True)
class FakePlugin:
    """As `socket_trt.engine.plugin.LoadedPlugin`."""

    path: Path = Path("libsocket_trt_plugin.so")
    sha256: str = "0" * 64
    release: str = "0.1.0"


def install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str = "8.6.0", plugin: Any = None, **driver: Any
) -> FakeTensorRT:
    fake_driver = FakeDriver(**driver)
    trt = FakeTensorRT(fake_driver, version)
    monkeypatch.setattr(cuda, "driver", fake_driver)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("socket_trt.runtime.tensorrt_session.RESERVE_BYTES", 0)
    loaded = plugin or FakePlugin()

    def open_fake() -> opening.TensorRT:
        from socket_trt.engine.plan import make_logger

        return opening.TensorRT(trt, make_logger(trt), loaded, cuda.Device().record)

    for place in ("socket_trt.engine.tensorrt", "socket_trt.runtime.tensorrt_session"):
        monkeypatch.setattr(f"{place}.open_tensorrt", open_fake)
    return trt
