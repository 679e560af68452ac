"""Whether TensorRT engines can be built here, and what is missing where they cannot."""

from __future__ import annotations

from typing import Literal

from socket_trt import environment
from socket_trt.errors import MissingDependencyError

BackendName = Literal["onnxruntime", "tensorrt"]


def missing_parts() -> list[str]:
    """What a TensorRT build lacks on this machine, each with how to get it; empty where nothing is missing."""
    missing = []
    if environment.gpu() is None:
        missing.append("an NVIDIA GPU with its driver (nvidia-smi finds none)")
    if environment.package_version("tensorrt") is None:
        missing.append("TensorRT's Python package (pip install tensorrt, or the archive from developer.nvidia.com)")
    if environment.plugin_library() is None:
        missing.append("the plugin library")
    missing.append(
        "a release of socket-trt that builds TensorRT engines (this one exports graphs and runs them on the CPU)"
    )
    return missing


def choose_backend(wanted: str) -> BackendName:
    """`--backend` as what will run the engine.  Raises MissingDependencyError for a TensorRT that is not there."""
    missing = missing_parts()
    if wanted == "tensorrt" and missing:
        raise MissingDependencyError(
            f"--backend tensorrt lacks {'; '.join(missing)}; --backend onnxruntime builds and runs the same graph on the CPU"
        )
    return "tensorrt" if wanted == "auto" and not missing else "onnxruntime"
