"""Engine directories for tests, built once a test process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from socket_trt.config import SocketConfig
from socket_trt.engine.build import BuildOptions, build_engine
from socket_trt.models.checkpoint import resolve_model
from socket_trt.progress import Silent

# Sparse from a few dozen tokens on.
SOCKET = SocketConfig(min_length=0, sink=8, window=8, budget_tokens=0, budget_permille=100, page_size=16)
MAX_SEQ_LEN = 512

_TEMPORARY: list[tempfile.TemporaryDirectory[str]] = []


def temporary_directory() -> Path:
    """One that goes when the process ends."""
    temporary = tempfile.TemporaryDirectory(prefix="socket-trt-test-")
    _TEMPORARY.append(temporary)
    return Path(temporary.name)


@functools.cache
def tiny_engine(dtype: str = "float32", **changes: object) -> Path:
    """An engine of `tiny`; read it; a test that writes takes a copy."""
    socket_changes = {key: value for key, value in changes.items() if key in SocketConfig.model_fields}
    options = {key: value for key, value in changes.items() if key not in socket_changes}
    directory = temporary_directory() / "engine"
    socket = SocketConfig.create(**SOCKET.model_dump() | socket_changes)
    build_options = BuildOptions(socket, dtype=dtype, **{"max_seq_len": MAX_SEQ_LEN} | options)  # type: ignore[arg-type]
    build_engine(resolve_model("tiny"), directory, build_options, Silent())
    return directory
