"""Validation tables of one tiny random model of every family, as docs/validation.md shows them.

python -m benchmarks.validate_families > docs/validation-tables.md
"""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
from pathlib import Path

from socket_trt.config import SocketConfig
from socket_trt.engine.build import BuildOptions, build_engine
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.models.checkpoint import resolve_model
from socket_trt.progress import Silent
from socket_trt.validation.report import ValidationReport
from socket_trt.validation.validate import validate_engine
from tests.families import CONFIGS, save_checkpoint

SOCKET = SocketConfig(min_length=0, sink=8, window=8, budget_tokens=0, budget_permille=100, page_size=16)
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "polygraphy")


def validate_family(name: str, dtype: str) -> ValidationReport:
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = save_checkpoint(name, Path(directory) / "checkpoint")
        options = BuildOptions(SOCKET, dtype=dtype, max_seq_len=512)  # type: ignore[arg-type]
        build_engine(resolve_model(str(checkpoint)), Path(directory) / "engine", options, Silent())
        return validate_engine(EngineDirectory.open(Path(directory) / "engine"), Silent())


def main() -> None:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    print("# Validation of every family\n")
    print("Written by `python -m benchmarks.validate_families`; the models are those of `tests/families.py`.")
    print(f"Machine: {platform.machine()}, CPU only, Python {platform.python_version()}, {versions}.\n")
    for dtype in ("float32", "float16"):
        print(f"## {dtype}\n")
        for name in CONFIGS:
            report = validate_family(name, dtype)
            lengths = " and ".join(map(str, report.sequence_lengths))
            print(f"### {name} ({report.family}), sequences of {lengths} tokens\n")
            print("| gate | outcome | measured | bound |\n|---|---|---|---|")
            for gate in report.gates:
                print(f"| {gate.gate.value} | {gate.outcome} | {gate.measured} | {gate.bound} |")
            print(flush=True)


if __name__ == "__main__":
    main()
