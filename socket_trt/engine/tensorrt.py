"""TensorRT on this machine: the module, its plugin and the GPU, or what is missing of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from socket_trt import environment
from socket_trt.engine.plan import major_version, make_logger
from socket_trt.errors import MissingDependencyError

if TYPE_CHECKING:
    from socket_trt.engine.plugin import LoadedPlugin
    from socket_trt.runtime.cuda import GpuRecord

BackendName = Literal["onnxruntime", "tensorrt"]

OLDEST = (8, 6)


@dataclasses.dataclass(frozen=True)
class TensorRT:
    """What building and running plans needs; made by `open_tensorrt`.

    module   the `tensorrt` package
    logger   its logger, with `explain()`
    plugin   the loaded plugin library
    gpu      the GPU of this process
    """

    module: Any
    logger: Any
    plugin: LoadedPlugin
    gpu: GpuRecord

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def major(self) -> int:
        return major_version(self.module)


def import_tensorrt() -> Any:
    """The `tensorrt` package.  Raises MissingDependencyError where it is not there, fails to load, or is too old."""
    try:
        module = importlib.import_module("tensorrt")
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "no TensorRT: install NVIDIA's Python package (docs/tensorrt.md), or build with --backend onnxruntime"
        ) from None
    except (ImportError, OSError) as error:
        raise MissingDependencyError(f"TensorRT's Python package does not load: {error}") from None
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if version < OLDEST:
        raise MissingDependencyError(f"TensorRT {module.__version__} is too old: 8.6, 10 and 11 are supported")
    return module


@functools.lru_cache(maxsize=1)
def open_tensorrt() -> TensorRT:
    """TensorRT with the plugin loaded, once a process.  Raises MissingDependencyError for the part that is missing."""
    from socket_trt.engine.plugin import load_plugin
    from socket_trt.runtime.cuda import Device

    gpu = Device().record  # first: TensorRT's own words for a missing driver help nobody
    module = import_tensorrt()
    logger = make_logger(module)
    return TensorRT(module, logger, load_plugin(module, logger), gpu)


def missing_parts() -> list[str]:
    """What a TensorRT build lacks on this machine, each with how to get it; empty where nothing is missing."""
    missing = []
    if environment.gpu() is None:
        missing.append("an NVIDIA GPU with its driver (nvidia-smi finds none)")
    if importlib.util.find_spec("tensorrt") is None:
        missing.append("TensorRT's Python package (from NVIDIA: docs/tensorrt.md)")
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        missing.append("cuda-python (pip install 'socket-trt[tensorrt]')")
    if environment.plugin_library() is None:
        missing.append("the plugin library (cmake --build: docs/development.md)")
    return missing


def choose_backend(wanted: str, with_plan: bool = True) -> BackendName:
    """`--backend` as what will run the engine; `with_plan`: its plan is to be built here.

    Raises MissingDependencyError for a TensorRT that is not there.
    """
    if wanted == "onnxruntime":
        return "onnxruntime"
    missing = missing_parts() if with_plan else []
    if wanted == "tensorrt" and missing:
        raise MissingDependencyError(
            f"--backend tensorrt lacks {'; '.join(missing)}; --no-plan leaves engine.plan to `socket-trt compile` on a "
            "machine that has them, --backend onnxruntime builds and runs the same graph on the CPU"
        )
    return "tensorrt" if wanted == "tensorrt" or not missing_parts() else "onnxruntime"
