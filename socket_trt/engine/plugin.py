"""The TensorRT plugin library: found for a TensorRT version, checked, and loaded into TensorRT's registry."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from socket_trt import __version__, names
from socket_trt.config import OperatorAttributes
from socket_trt.errors import MissingDependencyError

PLUGIN_VARIABLE = "SOCKET_TRT_PLUGIN"
# Majors of TensorRT that there is a plugin library for.
TENSORRT_MAJORS = (8, 10, 11)

_BUILD = "run 'cmake -B build -G Ninja && cmake --build build' with TensorRT's headers (docs/plugin.md)"


@dataclasses.dataclass(frozen=True)
class LoadedPlugin:
    """The library that a TensorRT module's registry has loaded.

    cublas  version of the cuBLAS that its `Linear` finds; None for a library without it, or where there is no cuBLAS
    """

    path: Path
    sha256: str
    release: str
    cublas: str | None = None


_loaded: dict[str, LoadedPlugin] = {}  # by the name of TensorRT's module: each has a registry of its own


def library_name(major: int) -> str:
    return f"libsocket_trt_plugin_{major}.so"


def autoload_name(major: int) -> str:
    return f"libsocket_trt_autoload_{major}.so"


def _directories() -> list[Path]:
    """Where libraries lie: beside this package, or in a build directory of the repository."""
    package = Path(__file__).resolve().parents[1]
    return [package, package / "lib", package.parent / "build", *sorted((package.parent / "build").glob("*/"))]


def find_plugin(tensorrt_version: str) -> Path:
    """The plugin library for a version of TensorRT such as "10.16.1.11".

    $SOCKET_TRT_PLUGIN names the library or a directory that holds it; without it the library lies beside this package,
    in the repository's `build` or in a directory below that.

    Raises MissingDependencyError where there is none.
    """
    text = tensorrt_version.split(".")[0]
    if not text.isdigit() or int(text) not in TENSORRT_MAJORS:
        majors = ", ".join(map(str, TENSORRT_MAJORS))
        raise MissingDependencyError(f"TensorRT {tensorrt_version} has no plugin library: use TensorRT {majors}")
    name = library_name(int(text))
    chosen = os.environ.get(PLUGIN_VARIABLE)
    if chosen:
        path = Path(chosen)
        path = path / name if path.is_dir() else path
        if not path.is_file():
            raise MissingDependencyError(f"{PLUGIN_VARIABLE} is {chosen}, but {path} does not exist")
        return path
    found = next((place / name for place in _directories() if (place / name).is_file()), None)
    if found is None:
        raise MissingDependencyError(f"{name} is not built: {_BUILD}, or set {PLUGIN_VARIABLE} to its path")
    return found


def find_autoload(tensorrt_version: str) -> Path:
    """The library that registers the plugin when it is opened, for tools that take plugin libraries of that kind.

    Raises MissingDependencyError where `find_plugin` does, or where it does not lie beside the plugin library.
    """
    plugin = find_plugin(tensorrt_version)
    path = plugin.with_name(autoload_name(int(tensorrt_version.split(".")[0])))
    if not path.is_file():
        raise MissingDependencyError(f"{path.name} does not lie beside {plugin}: {_BUILD}")
    return path


def check_library(path: Path, tensorrt_version: str) -> str:
    """Release of the plugin library at `path`, which is fit for this package and this TensorRT.

    Raises MissingDependencyError for a file that is no plugin library, another release or another TensorRT.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingDependencyError(f"the plugin library {path} does not load: {error}") from None
    try:
        read_release, read_major = library.SocketTrtPluginRelease, library.SocketTrtPluginTensorRtMajor
    except AttributeError:
        raise MissingDependencyError(f"{path} is no plugin library of socket-trt: {_BUILD}") from None
    read_release.restype = ctypes.c_char_p
    release, major = bytes(read_release()).decode(), int(read_major())
    if str(major) != tensorrt_version.split(".")[0]:
        raise MissingDependencyError(f"{path} is for TensorRT {major}, but TensorRT {tensorrt_version} is installed")
    if release != __version__:
        raise MissingDependencyError(f"{path} is of release {release}, this package is {__version__}: {_BUILD}")
    return release


def cublas_version(path: Path) -> str | None:
    """Version of the cuBLAS that the plugin library at `path` finds for products; None where it finds or needs none."""
    read_version = getattr(ctypes.CDLL(str(path)), "SocketTrtPluginCublas", None)
    number = 0 if read_version is None else int(read_version())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else None


def _creator(registry: Any) -> Any:
    """The operator's creator; None where it is not registered."""
    find = registry.get_creator if hasattr(registry, "get_creator") else registry.get_plugin_creator  # 8.6
    return find(names.OPERATOR, str(names.OPERATOR_VERSION), names.DOMAIN)


def load_plugin(trt_module: ModuleType, logger: Any = None) -> LoadedPlugin:
    """Load the plugin library into the registry of a TensorRT module (`tensorrt`, `tensorrt_lean`); once a process.

    trt_module  TensorRT's Python bindings of 8.6, 10 or 11
    logger      an `ILogger` of that module, told which library was loaded

    Raises MissingDependencyError where the library is missing, of another release or TensorRT, or not accepted.
    """
    if trt_module.__name__ in _loaded:
        return _loaded[trt_module.__name__]
    version = str(trt_module.__version__)
    path = find_plugin(version)
    release = check_library(path, version)
    registry = trt_module.get_plugin_registry()
    if _creator(registry) is not None:
        raise MissingDependencyError(
            f"another library has registered a plugin {names.OPERATOR} before {path}: load only one of them"
        )
    registry.load_library(str(path))
    creator = _creator(registry)
    if creator is None:
        raise MissingDependencyError(f"the registry of TensorRT {version} does not accept {path}; its log says why")
    expected = [field.name for field in dataclasses.fields(OperatorAttributes)]
    fields = [field.name for field in creator.field_names]
    if fields != expected:
        raise MissingDependencyError(f"{path} takes the fields {fields}, this package gives {expected}: {_BUILD}")
    plugin = LoadedPlugin(path, hashlib.sha256(path.read_bytes()).hexdigest(), release, cublas_version(path))
    if logger is not None:
        logger.log(trt_module.ILogger.Severity.INFO, f"{names.OPERATOR} {release} from {path}")
    _loaded[trt_module.__name__] = plugin
    return plugin
