"""GPU tests run where PyTorch sees a GPU and the native library is built; elsewhere each says what is missing."""

from __future__ import annotations

import pytest
import torch

from socket_trt.native import LIBRARY, library_path


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU that PyTorch can use"
    if library_path() is None:
        return f"{LIBRARY} is not built (docs/development.md)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    if reason:
        for item in items:
            if "tests/gpu/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
