"""Scripts that run Triton kernels on the CPU, in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so that each script is a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_PRELUDE = "from tests.triton_interpreter import convert_bounds\n\nconvert_bounds()\n"


def run_script(script: str) -> str:
    """What the script prints.  Skips without Triton; fails with what the script says."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton")
    result = subprocess.run(
        [sys.executable, "-c", _PRELUDE + script],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def convert_bounds() -> None:
    """Let arrays of one element be bounds of loops: NumPy 2.4 no longer does, and Triton 3.6's interpreter relies on it."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_convert(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_convert
