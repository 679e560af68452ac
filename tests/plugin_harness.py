"""Running plugins/tensorrt/harness: case files, the programs, and the TensorRT runtimes that CI installs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from socket_trt.config import SocketConfig, code_bits
from socket_trt.engine.plugin import TENSORRT_MAJORS, find_plugin, library_name
from socket_trt.errors import MissingDependencyError
from socket_trt.names import INTEGER_INPUTS, OPERATOR_INPUTS

REPOSITORY = Path(__file__).resolve().parents[1]

# name -> (type, value) as the harness writes them; a value of None is a field without data.
Fields = dict[str, tuple[str, object]]
Shapes = Mapping[str, Sequence[int]]


def fields_of(attributes: Mapping[str, object]) -> Fields:
    """Fields as TensorRT's ONNX parsers make them of the node's attributes: float32 and int32."""
    return {name: ("float32" if isinstance(v, float) else "int32", v) for name, v in attributes.items()}


def shapes_of(
    *,
    tokens: int,
    sequences: int,
    pages_per_sequence: int,
    query_heads: int = 8,
    kv_heads: int = 2,
    head_size: int = 64,
    pages: int = 10,
    page_size: int = 16,
    tables: int = 12,
    planes: int = 6,
) -> dict[str, tuple[int, ...]]:
    """Shapes of the operator's inputs, written out from the contract rather than from the plugin."""
    words = page_size * code_bits(planes) // 32
    return {
        "query": (1, query_heads, tokens, head_size),
        "key": (1, kv_heads, tokens, head_size),
        "value": (1, kv_heads, tokens, head_size),
        "key_cache": (pages, kv_heads, page_size, head_size),
        "value_cache": (pages, kv_heads, page_size, head_size),
        "code_cache": (pages, kv_heads, tables, words),
        "norm_cache": (pages, kv_heads, page_size),
        "page_table": (sequences, pages_per_sequence),
        "past_length": (sequences,),
        "query_start": (sequences + 1,),
        "planes": (tables, planes, head_size),
    }


def attributes(**changes: object) -> dict[str, object]:
    """Attributes of a small operator, in the schema's order."""
    config = SocketConfig(min_length=0, page_size=16, sink=4, window=5, budget_tokens=3, tables=12, planes=6)
    return dataclasses.asdict(config.attributes(0.125)) | changes


def write_case(
    path: Path, fields: Fields, shapes: Shapes | None = None, largest: Shapes | None = None, dtype: str = "float16"
) -> Path:
    """The case file that plugins/tensorrt/harness/harness.h describes."""

    def numbers(values: Sequence[int]) -> str:
        return " ".join(map(str, values))

    lines = []
    for name, (kind, value) in fields.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        lines.append(f"field {name} {kind} {' '.join(map(str, values))}")
    for name in OPERATOR_INPUTS if shapes else ():
        lines.append(f"tensor {name} {'int32' if name in INTEGER_INPUTS else dtype} {numbers(shapes[name])}")
        if largest:
            lines.append(f"largest {name} {numbers(largest[name])}")
    path.write_text("\n".join(lines) + "\n")
    return path


def lean_directories(major: int | None = None) -> Iterator[Path]:
    """Where `make tensorrt-lean` put TensorRT's lean runtimes: $SOCKET_TRT_TENSORRT_LEAN or build/tensorrt-lean."""
    root = Path(os.environ.get("SOCKET_TRT_TENSORRT_LEAN", REPOSITORY / "build" / "tensorrt-lean"))
    for directory in sorted(root.glob("*/")):
        if directory.suffix == ".part":  # of an installation that was interrupted
            continue
        if (directory / "tensorrt_lean_libs").is_dir() and major in (None, int(directory.name.split(".")[0])):
            yield directory


def runtime_library(major: int) -> Path:
    """A runtime library of TensorRT whose registry shall load the plugin; skips the test where there is none.

    $SOCKET_TRT_TEST_RUNTIME_<major> names one (`libnvinfer.so.<major>`), else a lean runtime is taken.
    """
    variable = f"SOCKET_TRT_TEST_RUNTIME_{major}"
    if variable in os.environ:
        return Path(os.environ[variable])
    found = [lib for d in lean_directories(major) for lib in d.glob("tensorrt_lean_libs/libnvinfer_lean.so.*")]
    if not found:
        pytest.skip(f"no runtime of TensorRT {major}: neither {variable} nor build/tensorrt-lean (make tensorrt-lean)")
    return found[-1]


def plugin_library(major: int) -> Path:
    """The plugin library; skips the test where it is not built."""
    try:
        return find_plugin(str(major))
    except MissingDependencyError:
        pytest.skip(f"{library_name(major)} is not built (needs CUDA's compiler and headers of TensorRT {major})")


def harness(major: int, command: str, case: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Run the harness beside the plugin library of a major; what it prints is in `stdout`."""
    library = plugin_library(major)
    program = library.parent / f"plugin_harness_{major}"
    if not program.is_file():
        pytest.skip(f"{program.name} is not built beside {library}")
    words = [program, command, "--plugin", library, "--case", case, *options]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=300)


ALL_MAJORS = pytest.mark.parametrize("major", TENSORRT_MAJORS)
