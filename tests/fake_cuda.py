"""CUDA's driver interface on host memory: what the project calls of it, with the real module's status codes and enums.

Work put on a stream runs at once, or, while the stream captures, whenever the captured graph is launched.  Addresses are
real, so whoever is given one can read and write there.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver as real

OK = (real.CUresult.CUDA_SUCCESS,)


class FakeDriver:
    """Stands in for `cuda.bindings.driver`; attributes that are not here are the real module's (enums)."""

    def __init__(
        self,
        total: int = 8 << 30,
        name: str = "Fake GPU",
        compute_capability: tuple[int, int] = (9, 0),
        devices: int = 1,
    ) -> None:
        """`total`: bytes of memory, of which allocations are taken; `devices`: GPUs, whose contexts are 100, 101, ..."""
        self.devices = devices
        self.current: int | None = None
        self.total = total
        self.name = name
        self.compute_capability = compute_capability
        self.allocations: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], None]] | None] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launches = 0
        self._handles = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CU"):
            return getattr(real, name)
        raise AttributeError(f"the fake driver has no {name}")

    @property
    def used(self) -> int:
        return sum(ctypes.sizeof(memory) for memory in self.allocations.values())

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Put work on a stream; what a fake TensorRT calls."""
        captured = self.streams[int(stream)]
        if captured is None:
            work()
        else:
            captured.append(work)

    def _copy(self, target: int, source: int, size: int, stream: int) -> tuple[Any, ...]:
        self._check(target, size)
        self._check(source, size)
        self.submit(stream, lambda: ctypes.memmove(target, source, size))
        return OK

    cuMemcpyHtoDAsync = cuMemcpyDtoHAsync = cuMemcpyDtoDAsync = _copy  # noqa: N815

    def _check(self, address: int, size: int) -> None:
        """A copy stays inside one allocation."""
        for base, memory in (*self.allocations.items(), *self.pinned.items()):
            if base <= address and address + size <= base + ctypes.sizeof(memory):
                return
        raise AssertionError(f"{size} bytes at {address:#x} lie in no allocation")

    def cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        self._check(target, size)
        self.submit(stream, lambda: ctypes.memset(target, value, size))
        return OK

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:  # noqa: N802
        if self.used + size > self.total:
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        memory = (ctypes.c_uint8 * size)()
        self.allocations[ctypes.addressof(memory)] = memory
        return *OK, ctypes.addressof(memory)

    def cuMemFree(self, address: int) -> tuple[Any, ...]:  # noqa: N802
        del self.allocations[address]
        return OK

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        memory = (ctypes.c_uint8 * size)()
        self.pinned[ctypes.addressof(memory)] = memory
        return *OK, ctypes.addressof(memory)

    def cuMemFreeHost(self, address: int) -> tuple[Any, ...]:  # noqa: N802
        del self.pinned[address]
        return OK

    def cuMemGetInfo(self) -> tuple[Any, ...]:  # noqa: N802
        return *OK, self.total - self.used, self.total

    def cuStreamCreate(self, flags: Any) -> tuple[Any, ...]:  # noqa: N802
        handle = next(self._handles)
        self.streams[handle] = None
        return *OK, handle

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        del self.streams[stream]
        return OK

    def cuStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:  # noqa: N802
        assert self.streams[stream] is None
        self.streams[stream] = []
        return OK

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        work, self.streams[stream] = self.streams[stream], None
        assert work is not None
        handle = next(self._handles)
        self.graphs[handle] = work
        return *OK, handle

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        handle = next(self._handles)
        self.graphs[handle] = list(self.graphs[graph])
        return *OK, handle

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        self.launches += 1
        for work in self.graphs[graph]:
            work()
        return OK

    def cuGraphDestroy(self, graph: int) -> tuple[Any, ...]:  # noqa: N802
        del self.graphs[graph]
        return OK

    cuGraphExecDestroy = cuGraphDestroy  # noqa: N815

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[Any, ...]:  # noqa: N802
        return *OK, 1.0

    def cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[Any, ...]:  # noqa: N802
        major = real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        return *OK, self.compute_capability[0 if attribute == major else 1]

    def cuDeviceGetName(self, length: int, device: int) -> tuple[Any, ...]:  # noqa: N802
        return *OK, self.name.encode().ljust(length, b"\0")

    def cuDeviceGetCount(self) -> tuple[Any, ...]:  # noqa: N802
        return *OK, self.devices

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:  # noqa: N802
        return *OK, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        return *OK, 100 + device

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:  # noqa: N802
        self.current = context
        return OK

    def _nothing(self, *arguments: Any) -> tuple[Any, ...]:
        return OK

    def _one(self, *arguments: Any) -> tuple[Any, ...]:
        return *OK, 1

    cuInit = cuCtxSynchronize = cuStreamSynchronize = _nothing  # noqa: N815
    cuEventRecord = cuEventSynchronize = cuEventDestroy = _nothing  # noqa: N815
    cuEventCreate = _one  # noqa: N815
