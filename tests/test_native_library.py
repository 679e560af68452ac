"""The native library without a GPU: it builds, loads, reports its kernels, and refuses what it cannot compute."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from socket_trt import native
from socket_trt.config import SocketConfig
from socket_trt.errors import MissingDependencyError

REPOSITORY = Path(__file__).resolve().parents[1]
HEADER = REPOSITORY / "plugins" / "include" / "socket_trt" / "kernels.h"

SIZES = {
    "tokens": 2,
    "sequences": 2,
    "query_heads": 8,
    "kv_heads": 2,
    "head_size": 128,
    "pages": 100,
    "pages_per_sequence": 32,
    "tables": 60,
    "planes_per_table": 8,
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> native.NativeLibrary:
    """The library that is built already, else one built here for one architecture."""
    path = native.library_path()
    if path is None:
        for tool in ("nvcc", "cmake", "ninja"):
            if shutil.which(tool) is None:
                pytest.skip(f"no {tool} on PATH to build {native.LIBRARY} with")
        try:
            import triton  # noqa: F401
        except ModuleNotFoundError:
            pytest.skip(f"no Triton to build {native.LIBRARY} with")
        build = tmp_path_factory.mktemp("build")
        options = ["-G", "Ninja", "-DSOCKET_TRT_ARCHITECTURES=80;90", f"-DPython3_EXECUTABLE={sys.executable}"]
        subprocess.run(["cmake", "-B", build, *options, REPOSITORY], check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        path = build / native.LIBRARY
    return native.NativeLibrary(path)


def params(**changes: float) -> native.Params:
    made = native.make_params(SocketConfig(min_length=0).attributes(0.1), 0, **SIZES)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_reports_its_kernels(library: native.NativeLibrary) -> None:
    release, *kernels = library.kernels()
    assert release.startswith("socket_trt_kernels ")
    entries = {tuple(line.split()) for line in kernels}
    assert len(entries) == len(kernels)
    for name in ("decode_sparse", "decode_dense_64", "decode_dense_16", "prefill_64", "prefill_16_capped"):
        for dtype in ("float16", "bfloat16"):
            for size in ("64", "96", "128", "256"):
                assert (name, "sm_90", dtype, size) in entries
                assert (name, "ptx", dtype, size) in entries, "no PTX for a newer GPU"


def test_structure_is_the_headers() -> None:
    """`Params` has the fields of `SocketTrtAttentionParams`, in order and of the same kind."""
    body = re.search(
        r"typedef struct SocketTrtAttentionParams \{(.*?)\} SocketTrtAttentionParams;", HEADER.read_text(), re.S
    )
    assert body
    text = re.sub(r"/\*.*?\*/", "", body[1], flags=re.S)
    kinds = {
        "uint32_t": ctypes.c_uint32,
        "int32_t": ctypes.c_int32,
        "uint64_t": ctypes.c_uint64,
        "float": ctypes.c_float,
    }
    expected = [
        (name, ctypes.c_void_p if "*" in kind else kinds[kind.strip()])
        for kind, name in re.findall(r"^\s*((?:const )?\w+[ *]+)(\w+);", text, re.M)
    ]
    assert list(native.Params._fields_) == expected


def test_workspace_grows_with_the_shapes(library: native.NativeLibrary) -> None:
    small, large = library.workspace_bytes(params()), library.workspace_bytes(params(pages_per_sequence=1024))
    assert 0 < small < large


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"struct_size": 8}, native.INVALID_ARGUMENT, "struct_size is 8"),
        ({"page_size": 48}, native.INVALID_ARGUMENT, "page_size is 48, expected a power of two"),
        ({"page_size": 8}, native.INVALID_ARGUMENT, "page_size is 8, expected 16 to 256"),
        ({"query_heads": 7}, native.INVALID_ARGUMENT, "7 query heads over 2 KV heads"),
        ({"query_heads": 34}, native.INVALID_ARGUMENT, "34 query heads over 2 KV heads"),
        ({"planes_per_table": 17}, native.INVALID_ARGUMENT, "planes_per_table is 17"),
        ({"tables": 0}, native.INVALID_ARGUMENT, "tables is 0"),
        ({"temperature": 0.0}, native.INVALID_ARGUMENT, "temperature is 0"),
        ({"dtype": 2}, native.INVALID_ARGUMENT, "dtype is 2"),
        ({"selection": 2}, native.INVALID_ARGUMENT, "selection is 2"),
        ({"budget_permille": 1001}, native.INVALID_ARGUMENT, "budget_permille is 1001"),
        ({"head_size": 80}, native.UNSUPPORTED, "head_size is 80"),
        ({"pages_per_sequence": 2**21}, native.UNSUPPORTED, "a sequence: at most"),
        ({"pages": 2**30}, native.UNSUPPORTED, "a pool of"),
        ({"tokens": 2**23}, native.UNSUPPORTED, "a step of 8388608 tokens of"),
    ],
)
def test_refuses_with_a_message(
    library: native.NativeLibrary, changes: dict[str, float], status: int, message: str
) -> None:
    with pytest.raises(native.NativeError, match=re.escape(message)) as raised:
        library.workspace_bytes(params(**changes))
    assert raised.value.status == status


def test_refuses_null_and_misaligned_pointers(library: native.NativeLibrary) -> None:
    made = params()
    with pytest.raises(native.NativeError, match="query is null") as raised:
        library.attention(made, 0)
    assert raised.value.status == native.INVALID_ARGUMENT
    made.query = 24
    with pytest.raises(native.NativeError, match="query is not aligned to 16 bytes"):
        library.attention(made, 0)


@pytest.mark.parametrize("empty", [{"tokens": 0}, {"tokens": 0, "sequences": 0}])
def test_nothing_to_do_succeeds(empty: dict[str, int], library: native.NativeLibrary) -> None:
    made = params(**empty)
    assert library.workspace_bytes(made) >= 0
    library.attention(made, 0)


def test_selection_view_lies_inside_the_workspace(library: native.NativeLibrary) -> None:
    made = params()
    view = library.selection_view(made)
    assert (view.items, view.heads) == (2, 8)
    assert view.counts_offset < view.slots_offset < library.workspace_bytes(made)


def test_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(MissingDependencyError, match=r"does not exist: run 'cmake"):
        native.load_library.__wrapped__()
