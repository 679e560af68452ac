"""The native CUDA library from Python: found, loaded with ctypes, and called on PyTorch tensors.

`native_attention` is `socket_trt.reference.socket_attention` on CUDA tensors.  The library itself knows no PyTorch; its
C interface is plugins/include/socket_trt/kernels.h, which `Params` mirrors field by field.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from socket_trt.config import OperatorAttributes
from socket_trt.errors import MissingDependencyError
from socket_trt.names import INTEGER_INPUTS, OPERATOR_INPUTS

if TYPE_CHECKING:
    from torch import Tensor

ABI_VERSION = 2
LIBRARY = "libsocket_trt_kernels.so"
LIBRARY_VARIABLE = "SOCKET_TRT_KERNELS"

INVALID_ARGUMENT = 1
UNSUPPORTED = 2
WORKSPACE_TOO_SMALL = 3
CUDA_ERROR = 4

# Bits of Params.stages, for benchmarks.
STAGES = {"append": 1, "score": 2, "select": 4, "attend": 8, "combine": 16, "prefill": 32}

DTYPES = {"torch.float16": 0, "torch.bfloat16": 1}

_SIZES = (
    "tokens",
    "sequences",
    "query_heads",
    "kv_heads",
    "head_size",
    "pages",
    "page_size",
    "pages_per_sequence",
    "tables",
    "planes_per_table",
)
_TENSORS = (*OPERATOR_INPUTS, "output")


class Params(ctypes.Structure):
    """`SocketTrtAttentionParams` of kernels.h."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in _SIZES),
        ("scale", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("sink", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("budget_tokens", ctypes.c_int32),
        ("budget_permille", ctypes.c_int32),
        ("min_length", ctypes.c_int32),
        ("selection", ctypes.c_int32),
        ("sliding_window", ctypes.c_int32),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
        ("stages", ctypes.c_uint32),
    )


class SelectionView(ctypes.Structure):
    """`SocketTrtSelectionView` of kernels.h."""

    _fields_ = (
        ("slots_offset", ctypes.c_uint64),
        ("counts_offset", ctypes.c_uint64),
        ("items", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("list_stride", ctypes.c_int32),
    )


class NativeError(RuntimeError):
    """A call of the library that did not succeed."""

    def __init__(self, status: int, text: str, message: str) -> None:
        super().__init__(f"{text}: {message}")
        self.status = status


class NativeLibrary:
    """The loaded library; every method raises NativeError where the C function reports a failure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dll = ctypes.CDLL(str(path))
        for name in ("SocketTrtKernels", "SocketTrtStatusText", "SocketTrtLastError"):
            getattr(self._dll, name).restype = ctypes.c_char_p
        self._dll.SocketTrtAttentionWorkspace.argtypes = (ctypes.POINTER(Params), ctypes.POINTER(ctypes.c_uint64))
        self._dll.SocketTrtAttentionSelection.argtypes = (ctypes.POINTER(Params), ctypes.POINTER(SelectionView))
        self._dll.SocketTrtAttention.argtypes = (ctypes.POINTER(Params), ctypes.c_void_p)
        found = int(self._dll.SocketTrtAbiVersion())
        if found != ABI_VERSION:
            raise MissingDependencyError(
                f"{path} has ABI version {found}, this package needs {ABI_VERSION}: build the library again"
            )

    def _check(self, status: int) -> None:
        if status:
            text, message = self._dll.SocketTrtStatusText(status), self._dll.SocketTrtLastError()
            raise NativeError(status, text.decode(), message.decode())

    def kernels(self) -> list[str]:
        """One line of release and CUDA architectures, then one an embedded kernel: name, architecture, dtype, D."""
        text: bytes = self._dll.SocketTrtKernels()
        return text.decode().splitlines()

    def prepare(self) -> None:
        """Load the kernels for the current device; a graph capture must not be the first to do so."""
        self._check(self._dll.SocketTrtPrepare())

    def workspace_bytes(self, params: Params) -> int:
        size = ctypes.c_uint64()
        self._check(self._dll.SocketTrtAttentionWorkspace(ctypes.byref(params), ctypes.byref(size)))
        return size.value

    def selection_view(self, params: Params) -> SelectionView:
        """Where a call with these shapes leaves its lists of attended slots in the workspace."""
        view = SelectionView()
        self._check(self._dll.SocketTrtAttentionSelection(ctypes.byref(params), ctypes.byref(view)))
        return view

    def attention(self, params: Params, stream: int) -> None:
        self._check(self._dll.SocketTrtAttention(ctypes.byref(params), stream))


def library_path() -> Path | None:
    """Where the library is: $SOCKET_TRT_KERNELS, beside this package, or in a build directory of the repository."""
    chosen = os.environ.get(LIBRARY_VARIABLE)
    if chosen:
        return Path(chosen)
    package = Path(__file__).resolve().parent
    places = (package, package.parent / "build", *sorted((package.parent / "build").glob("*/")))
    return next((place / LIBRARY for place in places if (place / LIBRARY).is_file()), None)


@functools.cache
def load_library() -> NativeLibrary:
    """The native library, loaded once.  Raises MissingDependencyError where it is not there or does not load."""
    path = library_path()
    if path is None or not path.is_file():
        where = f"{path} does not exist" if path else f"{LIBRARY} is not built"
        raise MissingDependencyError(
            f"{where}: run 'cmake -B build -G Ninja && cmake --build build' or set {LIBRARY_VARIABLE} to its path"
        )
    try:
        return NativeLibrary(path)
    except OSError as error:
        raise MissingDependencyError(f"{path} does not load: {error}") from None


def call_layer(name: str, *arguments: Tensor | int | float) -> int:
    """Call a function of plugins/include/socket_trt/layers.h on PyTorch's current stream; returns its cudaError_t.

    Tensors, ints and floats in the order of the C declaration, without the stream.  Checks nothing.
    """
    import torch

    def converted(argument: Tensor | int | float) -> Any:
        if isinstance(argument, int):
            return ctypes.c_int32(argument)
        return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_void_p(argument.data_ptr())

    function = getattr(load_library()._dll, name)
    return int(function(*map(converted, arguments), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)))


def prepare_layers() -> None:
    """Load the kernels that `call_layer` launches, for the current device.  Raises NativeError where CUDA cannot."""
    status = int(load_library()._dll.SocketTrtPrepareLayers())
    if status:
        raise NativeError(status, f"CUDA error {status}", "the kernels of layers cannot be loaded")


def make_params(attributes: OperatorAttributes, dtype: int, **sizes: int) -> Params:
    """Parameters without tensors: enough to ask for the workspace.  `sizes` as in `_SIZES`, less page_size."""
    fields: dict[str, Any] = attributes.as_dict()
    fields |= sizes
    return Params(struct_size=ctypes.sizeof(Params), dtype=dtype, **fields)


def native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor,
    page_table: Tensor,
    past_length: Tensor,
    query_start: Tensor,
    planes: Tensor,
    attributes: OperatorAttributes,
    *,
    in_place: bool = False,
    output: Tensor | None = None,
    workspace: Tensor | None = None,
    stages: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`socket_attention` on CUDA tensors, float16 or bfloat16: output and the four caches after the step.

    in_place    update the caches given (and return them) instead of copies
    output      [1, Hq, N, D] in query's dtype to write to, else allocated
    workspace   uint8, `NativeLibrary.workspace_bytes` of them, to work in, else allocated from PyTorch's pool
    stages      bits of `STAGES` to run, for benchmarks; 0: all

    Nothing is read back from the device: page numbers and lengths out of range are not reported, but harmless.
    Raises ValueError for a tensor of the wrong device, dtype or shape, NativeError for sizes that the kernels do not
    cover, MissingDependencyError where the library is not there.
    """
    import torch

    from socket_trt.reference.operator import check_shapes

    inputs = (
        query,
        key,
        value,
        key_cache,
        value_cache,
        code_cache,
        norm_cache,
        page_table,
        past_length,
        query_start,
        planes,
    )
    named = dict(zip(OPERATOR_INPUTS, inputs, strict=True))
    for name, tensor in named.items():
        integer = name in INTEGER_INPUTS
        expected = torch.int32 if integer else query.dtype
        if tensor.device != query.device or tensor.dtype != expected:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, expected {expected} on {query.device}")
    if query.device.type != "cuda" or str(query.dtype) not in DTYPES:
        raise ValueError(
            f"query is {query.dtype} on {query.device}, the native operator takes float16 or bfloat16 on CUDA"
        )
    check_shapes(named, attributes)
    library = load_library()
    given = (key_cache, value_cache, code_cache, norm_cache)
    key_cache, value_cache, code_cache, norm_cache = given if in_place else (cache.clone() for cache in given)
    caches = (key_cache, value_cache, code_cache, norm_cache)
    named |= dict(zip(_TENSORS[3:7], caches, strict=True))
    named = {name: tensor.contiguous() for name, tensor in named.items()}
    if any(named[name].data_ptr() != cache.data_ptr() for name, cache in zip(_TENSORS[3:7], caches, strict=True)):
        raise ValueError("caches must be contiguous")
    named["output"] = torch.empty_like(named["query"]) if output is None else output

    with torch.cuda.device(query.device):
        params = params_of(query, key_cache, page_table, planes, attributes)
        for name, tensor in named.items():
            setattr(params, name, tensor.data_ptr())
        size = library.workspace_bytes(params)
        if workspace is None:
            workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
        params.workspace, params.workspace_bytes = workspace.data_ptr(), workspace.numel()
        params.stages = stages
        library.attention(params, torch.cuda.current_stream().cuda_stream)
    return named["output"], *caches


def params_of(
    query: Tensor, key_cache: Tensor, page_table: Tensor, planes: Tensor, attributes: OperatorAttributes
) -> Params:
    """Parameters of a call with tensors of these shapes, without the tensors."""
    return make_params(
        attributes,
        DTYPES[str(query.dtype)],
        tokens=query.shape[2],
        sequences=page_table.shape[0],
        query_heads=query.shape[1],
        kv_heads=key_cache.shape[1],
        head_size=query.shape[3],
        pages=key_cache.shape[0],
        pages_per_sequence=page_table.shape[1],
        tables=planes.shape[0],
        planes_per_table=planes.shape[1],
    )
