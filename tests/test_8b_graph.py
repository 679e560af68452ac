"""The graph of an 8B model on a small machine: the figures README gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_CODE = """
import json, resource, sys
from socket_trt.cli.main import main
try:
    main(["build", "--model", "llama3-8b", "--random-weights", "--graph-only", "-o", sys.argv[1]])
finally:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_kib": usage.ru_maxrss}), file=sys.stderr)
"""


def test_8b_graph_only(tmp_path: Path) -> None:
    """CPU seconds and not wall clock, because other tests share the machine."""
    output = tmp_path / "llama3-8b"
    command = [sys.executable, "-c", _CODE, str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    usage = json.loads(result.stderr.splitlines()[-1])
    assert usage["cpu_seconds"] < 90
    assert usage["peak_kib"] < 2 << 20
    assert (output / "model.onnx").stat().st_size < 10_000_000
    manifest = json.loads((output / "build.json").read_text())
    assert manifest["model"]["layers"] == 32
    assert len(manifest["weights"]["tensors"]) == 291
