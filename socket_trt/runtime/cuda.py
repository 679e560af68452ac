"""The few parts of CUDA's driver interface that a session needs, through cuda-python, with errors that say what to do."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from socket_trt.errors import EngineError, MissingDependencyError

try:
    from cuda.bindings import driver
except ImportError:
    raise MissingDependencyError(
        "TensorRT engines run through cuda-python: pip install 'socket-trt[tensorrt]'"
    ) from None

Bytes = npt.NDArray[np.uint8]


class OutOfGpuMemoryError(EngineError):
    """The GPU has too little free memory for what was asked."""


class CudaError(EngineError):
    """A call of the driver failed."""


def _call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Values that a driver call returns besides its status.  Raises CudaError."""
    status, *values = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{function.__name__} failed: {status.name}")
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


@dataclasses.dataclass(frozen=True)
class GpuRecord:
    """The GPU as an engine's plan depends on it."""

    name: str
    compute_capability: str


class DeviceBuffer:
    """`size` bytes of GPU memory at `address` (aligned to 256 bytes)."""

    def __init__(self, size: int) -> None:
        """Raises OutOfGpuMemoryError."""
        self.size = size
        status, pointer = driver.cuMemAlloc(max(1, size))
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfGpuMemoryError(f"the GPU has no {size / 2**30:.2f} GiB left in one piece")
        if status != driver.CUresult.CUDA_SUCCESS:
            raise CudaError(f"cuMemAlloc failed: {status.name}")
        self.address = int(pointer)

    def free(self) -> None:
        if self.address:
            _call(driver.cuMemFree, self.address)
            self.address = 0


class PinnedBuffer:
    """Page-locked host memory, which the GPU copies from and to on its own; `bytes` is a view of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(_call(driver.cuMemHostAlloc, max(1, size), 0))
        self.bytes: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * max(1, size)).from_address(self.address))

    def free(self) -> None:
        if self.address:
            del self.bytes
            _call(driver.cuMemFreeHost, self.address)
            self.address = 0


class Graph:
    """A captured sequence of GPU work that one call launches."""

    def __init__(self, executable: Any) -> None:
        self._executable = executable

    def launch(self, stream: Stream) -> None:
        _call(driver.cuGraphLaunch, self._executable, stream.handle)

    def free(self) -> None:
        if self._executable is not None:
            _call(driver.cuGraphExecDestroy, self._executable)
            self._executable = None


class Stream:
    """A queue of GPU work."""

    def __init__(self) -> None:
        self._stream = _call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)

    @property
    def handle(self) -> int:
        return int(self._stream)

    def to_device(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes from page-locked host memory."""
        _call(driver.cuMemcpyHtoDAsync, target, source, size, self.handle)

    def to_host(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes to page-locked host memory."""
        _call(driver.cuMemcpyDtoHAsync, target, source, size, self.handle)

    def on_device(self, target: int, source: int, size: int) -> None:
        _call(driver.cuMemcpyDtoDAsync, target, source, size, self.handle)

    def zero(self, target: int, size: int) -> None:
        _call(driver.cuMemsetD8Async, target, 0, size, self.handle)

    def synchronize(self) -> None:
        _call(driver.cuStreamSynchronize, self.handle)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What `enqueue` puts on this stream, as a graph; nothing of it runs.  Raises what `enqueue` raises."""
        _call(driver.cuStreamBeginCapture, self.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            status, graph = driver.cuStreamEndCapture(self.handle)  # the stream is of no use while it captures
            if status == driver.CUresult.CUDA_SUCCESS:
                driver.cuGraphDestroy(graph)
            raise
        graph = _call(driver.cuStreamEndCapture, self.handle)
        try:
            return Graph(_call(driver.cuGraphInstantiate, graph, 0))
        finally:
            _call(driver.cuGraphDestroy, graph)

    def free(self) -> None:
        if self._stream is not None:
            _call(driver.cuStreamDestroy, self.handle)
            self._stream = None


class Event:
    """A point in a stream; two of them tell the time between."""

    def __init__(self) -> None:
        self._event = _call(driver.cuEventCreate, driver.CUevent_flags.CU_EVENT_DEFAULT)

    def record(self, stream: Stream) -> None:
        _call(driver.cuEventRecord, self._event, stream.handle)

    def synchronize(self) -> None:
        _call(driver.cuEventSynchronize, self._event)

    def milliseconds_since(self, earlier: Event) -> float:
        return float(_call(driver.cuEventElapsedTime, earlier._event, self._event))

    def free(self) -> None:
        if self._event is not None:
            _call(driver.cuEventDestroy, self._event)
            self._event = None


class Device:
    """A GPU that the process sees, the first by default, its primary context made current on the calling thread."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises MissingDependencyError where there is no such GPU or no driver."""
        try:
            status = driver.cuInit(0)[0]
        except RuntimeError as error:  # cuda-python finds no libcuda
            raise MissingDependencyError(f"no NVIDIA driver: {error}") from None
        if status != driver.CUresult.CUDA_SUCCESS:
            raise MissingDependencyError(f"no usable NVIDIA GPU: cuInit says {status.name}")
        count = _call(driver.cuDeviceGetCount)
        if count < 1:
            raise MissingDependencyError("no NVIDIA GPU is visible (CUDA_VISIBLE_DEVICES?)")
        if ordinal >= count:
            raise MissingDependencyError(
                f"GPU {ordinal} is not visible, {count} are, from 0 on (CUDA_VISIBLE_DEVICES?)"
            )
        self._device = _call(driver.cuDeviceGet, ordinal)
        self._context = _call(driver.cuDevicePrimaryCtxRetain, self._device)
        self.activate()

    def activate(self) -> None:
        """Make the context current on this thread: a server may step from another one than it opened the session on."""
        _call(driver.cuCtxSetCurrent, self._context)

    @property
    def record(self) -> GpuRecord:
        attribute = driver.CUdevice_attribute
        major = _call(driver.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self._device)
        minor = _call(driver.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self._device)
        name = _call(driver.cuDeviceGetName, 256, self._device)
        return GpuRecord(name.decode().rstrip("\0 "), f"{major}.{minor}")

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = _call(driver.cuMemGetInfo)
        return int(free), int(total)

    def synchronize(self) -> None:
        _call(driver.cuCtxSynchronize)
