"""Engine directories for tests, built once a test run."""

from __future__ import annotations

import fcntl
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

from socket_trt.config import SocketConfig
from socket_trt.engine.build import BuildOptions, build_engine
from socket_trt.models.checkpoint import resolve_model
from socket_trt.progress import Silent
from tests import SHARED_VARIABLE

# Sparse from a few dozen tokens on.
SOCKET = SocketConfig(min_length=0, sink=8, window=8, budget_tokens=0, budget_permille=100, page_size=16)
MAX_SEQ_LEN = 512


def shared_directory(name: str, fill: Callable[[Path], None]) -> Path:
    """The directory `name`, which `fill` makes once in a test run, in whichever of its processes asks first."""
    root = Path(os.environ[SHARED_VARIABLE])
    directory = root / re.sub(r"[^A-Za-z0-9_.=,-]+", "-", name)
    with (root / f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            partial = root / f"{directory.name}.partial"
            fill(partial)
            partial.rename(directory)
    return directory


@functools.cache
def tiny_engine(dtype: str = "float32", **changes: object) -> Path:
    """An engine of `tiny`; read it; a test that writes takes a copy."""
    socket_changes = {key: value for key, value in changes.items() if key in SocketConfig.model_fields}
    options = {key: value for key, value in changes.items() if key not in socket_changes}
    socket = SocketConfig.create(**SOCKET.model_dump() | socket_changes)
    build_options = BuildOptions(socket, dtype=dtype, **{"max_seq_len": MAX_SEQ_LEN} | options)  # type: ignore[arg-type]
    described = ",".join([dtype, *(f"{key}={changes[key]}" for key in sorted(changes))])
    return shared_directory(
        f"tiny,{described}", lambda directory: build_engine(resolve_model("tiny"), directory, build_options, Silent())
    )
