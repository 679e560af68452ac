"""What this machine and this Python have: GPU, TensorRT, compilers, packages."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
import subprocess
from pathlib import Path

from socket_trt.engine.plugin import TENSORRT_MAJORS, find_plugin
from socket_trt.errors import MissingDependencyError


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing that may be there: what was found (None: nothing), and what it is good for."""

    name: str
    found: str | None
    enables: str


def package_version(name: str) -> str | None:
    """Version of an installed Python distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def tensorrt_version() -> str | None:
    """Version of the package `tensorrt`, whichever distribution brought it: `tensorrt`, `tensorrt-cu13`, ..."""
    for name in ("tensorrt", *importlib.metadata.packages_distributions().get("tensorrt", ())):
        version = package_version(name)
        if version is not None:
            return version
    return None


def _first_line(*command: str) -> str | None:
    """First line that a program prints; None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = result.stdout.strip().splitlines()
    return lines[0].strip() if lines else None


def gpu() -> str | None:
    """Name and memory of the first NVIDIA GPU."""
    return _first_line("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")


def driver() -> str | None:
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def nvcc() -> str | None:
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.split("release")[1].strip() for line in text.splitlines() if "release" in line), "found")


def plugin_library() -> Path | None:
    """The plugin library for the TensorRT that is installed; where none is, the one for the newest TensorRT."""
    installed = tensorrt_version()
    for version in [installed] if installed else map(str, reversed(TENSORRT_MAJORS)):
        try:
            return find_plugin(version)
        except MissingDependencyError:
            continue
    return None


def survey() -> list[Part]:
    """Everything `socket-trt doctor` reports."""
    library = plugin_library()
    return [
        Part("GPU", gpu(), "TensorRT engines, CUDA kernels"),
        Part("driver", driver(), "TensorRT engines, CUDA kernels"),
        Part("TensorRT", tensorrt_version(), "build --backend tensorrt, compile"),
        Part("plugin library", str(library) if library else None, "SocketAttention in TensorRT engines"),
        Part("nvidia-cublas-cu12", package_version("nvidia-cublas-cu12"), "faster products on TensorRT 8.6"),
        Part("cuda-bindings", package_version("cuda-bindings"), "running TensorRT engines"),
        Part("onnx", package_version("onnx"), "build, compile, validate"),
        Part("nvcc", nvcc(), "building the CUDA kernels and the plugin"),
        Part("triton", package_version("triton"), "compiling the Triton kernels"),
        Part("tritonclient", package_version("tritonclient"), "deploy"),
        Part("tritonserver", shutil.which("tritonserver"), "serving engines"),
        Part("onnxruntime", package_version("onnxruntime"), "running engines on the CPU"),
        Part("torch", package_version("torch"), "build, validate"),
        Part("transformers", package_version("transformers"), "build, validate"),
        Part("onnxscript", package_version("onnxscript"), "build"),
        Part("polygraphy", package_version("polygraphy"), "validate"),
    ]
