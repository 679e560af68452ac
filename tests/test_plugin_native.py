"""The plugin libraries without a GPU: what they accept and refuse, and their life cycle up to execution."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from socket_trt import native
from socket_trt.config import INT32_MAX, SocketConfig
from socket_trt.engine.plugin import cublas_version
from tests.plugin_harness import (
    ALL_MAJORS,
    REPOSITORY,
    Fields,
    attributes,
    fields_of,
    harness,
    plugin_library,
    runtime_library,
    shapes_of,
    write_case,
)

STEP = shapes_of(tokens=33, sequences=3, pages_per_sequence=4)
LARGEST = shapes_of(tokens=2048, sequences=8, pages_per_sequence=32, pages=100)


def without(name: str) -> Fields:
    return {key: value for key, value in fields_of(attributes()).items() if key != name}


def walk(major: int, dtype: str, directory: Path, *registry: object) -> str:
    case = write_case(directory / "case", fields_of(attributes()), STEP, LARGEST, dtype)
    result = harness(major, "walk", case, *registry)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "life cycle complete" in result.stdout
    return result.stdout


@pytest.mark.parametrize(("major", "dtype"), [(8, "float16"), (10, "float16"), (11, "float16"), (11, "bfloat16")])
def test_life_cycle(major: int, dtype: str, tmp_path: Path) -> None:
    """Creator, clone, types, shapes, formats, configuration, workspace, serialisation (truncated, foreign, of another
    format and release), recreation, attaching, refused execution.
    """
    walk(major, dtype, tmp_path)


@ALL_MAJORS
def test_life_cycle_of_a_plugin_from_the_real_registry(major: int, tmp_path: Path) -> None:
    printed = walk(major, "float16", tmp_path, "--tensorrt", runtime_library(major))
    assert "the registry loads the library" in printed


@ALL_MAJORS
def test_refuses_fields_with_a_message(major: int, tmp_path: Path) -> None:
    good = fields_of(attributes())
    cases: list[tuple[Fields, str]] = [
        (good | {"sinks": ("int32", 4)}, "field 'sinks' is unknown, expected some of scale, temperature, sink"),
        *(
            (without(name), f"field '{name}' is missing")
            for name in good
            if name not in ("sliding_window", "softcap")  # they have defaults
        ),
        (good | {"scale": ("int32", 1)}, "field 'scale' is int32, expected float32 or float64"),
        (good | {"sink": ("float32", 4.0)}, "field 'sink' is float32, expected int32 or int64"),
        (good | {"sink": ("text", "four")}, "field 'sink' is text, expected int32 or int64"),
        (good | {"sink": ("int32", [4, 5])}, "field 'sink' has 2 values, expected 1"),
        (good | {"sink": ("int32", None)}, "field 'sink' has 0 values, expected 1"),
        (good | {"scale": ("float32", "nan")}, "field 'scale' is nan, expected a finite number"),
        (good | {"scale": ("float64", 1e300)}, "field 'scale' is 1e+300, expected a finite number"),
        (good | {"temperature": ("float32", 0.0)}, "field 'temperature' is 0, expected at least"),
        (good | {"sink": ("int32", -1)}, "field 'sink' is -1, expected 0 to 2147483647"),
        (good | {"window": ("int32", -1)}, "field 'window' is -1, expected 0 to 2147483647"),
        (good | {"budget_tokens": ("int32", -1)}, "field 'budget_tokens' is -1"),
        (good | {"budget_permille": ("int32", 1001)}, "field 'budget_permille' is 1001, expected 0 to 1000"),
        (good | {"min_length": ("int32", -1)}, "field 'min_length' is -1"),
        (good | {"selection": ("int32", 2)}, "field 'selection' is 2, expected 0 to 1"),
        (good | {"page_size": ("int32", 48)}, "field 'page_size' is 48, expected a power of two"),
        (good | {"page_size": ("int32", 8)}, "field 'page_size' is 8, expected 16 to 256"),
        (good | {"sliding_window": ("int32", 0)}, "field 'sliding_window' is 0, expected -1 (none) or at least 1"),
        (good | {"softcap": ("float32", -1.0)}, "field 'softcap' is -1, expected at least 0 and finite"),
    ]
    if major >= 10:
        cases.append((good | {"sink": ("int64", 2**31)}, "field 'sink' is 2147483648, expected 0 to 2147483647"))
    for fields, message in cases:
        result = harness(major, "create", write_case(tmp_path / "case", fields))
        assert result.returncode == 3, f"not refused: {message}\n{result.stdout}{result.stderr}"
        assert message in result.stdout, result.stdout


@ALL_MAJORS
def test_a_field_given_twice_is_refused(major: int, tmp_path: Path) -> None:
    case = write_case(tmp_path / "case", fields_of(attributes()))
    case.write_text(case.read_text() + "field sink int32 4\n")
    result = harness(major, "create", case)
    assert result.returncode == 3
    assert "field 'sink' is given twice" in result.stdout


@ALL_MAJORS
def test_accepts_defaults_wide_types_and_the_parsers_strings(major: int, tmp_path: Path) -> None:
    """Optional fields may be absent, numbers may be wide, and plugin_version and plugin_namespace mean nothing."""
    wide = "int64" if major >= 10 else "int32"  # TensorRT 8.6 has no int64 fields
    good = fields_of(attributes(budget_tokens=INT32_MAX, min_length=INT32_MAX))
    cases: list[Fields] = [
        {name: value for name, value in good.items() if name not in ("sliding_window", "softcap")},
        {name: ("float64" if kind == "float32" else wide, value) for name, (kind, value) in good.items()},
        good | {"plugin_version": ("text", "1"), "plugin_namespace": ("text", "socket")},
    ]
    for fields in cases:
        result = harness(major, "create", write_case(tmp_path / "case", fields))
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("seed", range(12))
def test_workspace_suffices_for_every_smaller_step(seed: int, tmp_path: Path) -> None:
    """The bytes that TensorRT reserves at a profile's maximum, against what the kernels need below it.

    The batch matters: a smaller one is split into more parts, and may need more than the largest one.
    """
    rng = random.Random(seed)
    config = SocketConfig(
        page_size=64,
        planes=rng.choice([8, 10]),
        tables=rng.choice([12, 60]),
        selection=rng.choice([0, 1]),
        min_length=rng.choice([0, 500, INT32_MAX]),
        budget_tokens=rng.choice([0, 1024]),
    )
    fixed = {"query_heads": rng.choice([8, 16]), "kv_heads": rng.choice([1, 2, 8]), "head_size": 128, "pages": 50}
    codes = {"page_size": 64, "tables": config.tables, "planes": config.planes}
    sizes = {
        "tokens": rng.choice([1, 5, 300, 2048]),
        "sequences": rng.randint(1, 40),
        "pages_per_sequence": rng.choice([1, 20, 3000]),
    }
    operator = config.attributes(0.1)
    case = write_case(
        tmp_path / "case",
        fields_of(operator.as_dict()),
        shapes_of(tokens=1, sequences=1, pages_per_sequence=1, **fixed, **codes),
        shapes_of(**sizes, **fixed, **codes),
    )
    result = harness(11, "workspace", case)
    assert result.returncode == 0, result.stdout + result.stderr
    reserved = int(result.stdout.splitlines()[-1])
    library = native.load_library()
    most = 0
    steps = [{name: rng.randint(1, size) for name, size in sizes.items()} for _ in range(300)]
    steps += [sizes | {"sequences": n} for n in range(1, sizes["sequences"] + 1)]
    for step in steps:
        params = native.make_params(operator, 0, **step, **fixed, tables=config.tables, planes_per_table=config.planes)
        most = max(most, library.workspace_bytes(params))
        assert most <= reserved - 255, step  # 255: the address may have to be aligned to 256
    assert most == reserved - 255, "more is reserved than any step needs"


def test_the_largest_batch_may_need_less_than_a_smaller_one() -> None:
    """What the test above relies on: without it the workspace of the maximum alone would do."""
    plugin_library(11)
    sizes = {"query_heads": 32, "kv_heads": 8, "head_size": 128, "pages": 50, "tables": 60, "planes_per_table": 8}
    operator = SocketConfig().attends_densely().attributes(0.1)

    def needed(sequences: int) -> int:
        params = native.make_params(operator, 0, tokens=4096, sequences=sequences, pages_per_sequence=1000, **sizes)
        return native.load_library().workspace_bytes(params)

    assert max(needed(n) for n in range(1, 9)) > needed(8)


CUBLAS = """
int cublasGetProperty(int part, int *value) { *value = (int[]){12, 9, 1}[part]; return 0; }
int cublasCreate_v2(void **handle) { return 1; }
int cublasSetStream_v2(void *handle, void *stream) { return 1; }
int cublasSetWorkspace_v2(void *handle, void *workspace, unsigned long bytes) { return 1; }
"""
GEMM = "int cublasGemmEx(void) { return 1; }"


@pytest.mark.parametrize(("source", "found"), [(CUBLAS + GEMM, "12.9.1"), (CUBLAS, None)])
def test_cublas_is_taken_for_one_only_if_it_is_whole(source: str, found: str | None, tmp_path: Path) -> None:
    """In a process that has loaded what bears its name, as TensorRT 8.6 has."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc), which makes a library that is named like cuBLAS")
    library = tmp_path / "libcublas.so.12"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-Wl,-soname,libcublas.so.12", "-o", library],
        input=source, text=True, check=True,
    )  # fmt: skip
    program = (
        "import ctypes, pathlib, sys; ctypes.CDLL(sys.argv[1])\n"
        "from socket_trt.engine.plugin import cublas_version; print(cublas_version(pathlib.Path(sys.argv[2])))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, library, plugin_library(8)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == str(found)


def test_libraries_for_later_versions_of_tensorrt_need_no_cublas() -> None:
    assert cublas_version(plugin_library(10)) is None
