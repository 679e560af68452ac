"""The same plan by NVIDIA's own tools: command lines of `trtexec` and `polygraphy run`, for whoever debugs a build.

Both take `network.onnx`, the graph that the plan was built from.  They differ from the build in two things: only the
build lets matrix products read weights without a transpose, and on TensorRT 8.6 the tools are told the types of layers by
name.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from socket_trt.engine.manifest import Manifest, PlanRecord, TensorRecord
from socket_trt.engine.profiles import Profile, Shape, engine_profiles

_SHAPE_OPTIONS = ("min", "opt", "max")


def trtexec_command(
    manifest: Manifest, record: PlanRecord, network: Path, plugin: Path, float32_layers: list[str]
) -> str:
    """`trtexec` for this plan.  `float32_layers`: names of layers that TensorRT 8.6 is held to float32 in."""
    parts = ["trtexec", f"--onnx={network}", f"--saveEngine={network.with_name(record.file)}"]
    major = _major(record)
    parts.append(f"--staticPlugins={plugin}")
    for index, profile in enumerate(_profiles(manifest, record)):
        if major >= 10:
            parts.append(f"--profile={index}")
        elif index:
            break  # trtexec 8.6 builds one profile: this one is for decode steps
        for position, option in enumerate(_SHAPE_OPTIONS):
            shapes = ",".join(f"{name}:{_x(three[position])}" for name, three in _dynamic(manifest, profile))
            parts.append(f"--{option}Shapes={shapes}")
    if major < 10:
        types = ",".join(["*:fp16", *(f"{name}:fp32" for name in float32_layers)])
        parts += ["--fp16", "--precisionConstraints=obey", f"--layerPrecisions={types}", f"--layerOutputTypes={types}"]
        parts += ["--tacticSources=-CUBLAS,-CUBLAS_LT,-CUDNN,-EDGE_MASK_CONVOLUTIONS,-JIT_CONVOLUTIONS"]
        parts += ["--preview=+profileSharing0806"]
    elif major == 10:
        parts += ["--stronglyTyped", "--preview=+aliasedPluginIO1003"]
    else:
        parts += ["--preview=+aliasedPluginIO1003"]
    parts += ["--profilingVerbosity=detailed", "--skipInference"]
    return shlex.join(parts)


def polygraphy_command(
    manifest: Manifest, record: PlanRecord, network: Path, plugin: Path, float32_layers: list[str]
) -> str:
    """`polygraphy run` that builds this plan and runs it once on inputs of its own."""
    parts = ["polygraphy", "run", str(network), "--trt", "--plugins", str(plugin)]
    for profile in _profiles(manifest, record):
        for position, option in enumerate(_SHAPE_OPTIONS):
            parts.append(f"--trt-{option}-shapes")
            parts += [f"{name}:[{','.join(map(str, three[position]))}]" for name, three in _dynamic(manifest, profile)]
    major = _major(record)
    if major < 10:
        parts += ["--fp16", "--precision-constraints", "obey", "--tactic-sources"]
        parts += ["--preview-features", "PROFILE_SHARING_0806"]
        if float32_layers:
            parts += ["--layer-precisions", *(f"{name}:float32" for name in float32_layers)]
    else:
        parts += ["--strongly-typed"] if major == 10 else []
        parts += ["--preview-features", "ALIASED_PLUGIN_IO_10_03"]
    parts += ["--profiling-verbosity", "DETAILED", "--save-engine", str(network.with_name(record.file))]
    return shlex.join(parts)


def _major(record: PlanRecord) -> int:
    return int(record.tensorrt.split(".")[0])


def _profiles(manifest: Manifest, record: PlanRecord) -> list[Profile]:
    return engine_profiles(manifest, record.max_step_tokens, record.max_pages)


def _dynamic(manifest: Manifest, profile: Profile) -> list[tuple[str, tuple[Shape, Shape, Shape]]]:
    return [(record.name, profile.shapes(record)) for record in manifest.graph.inputs if _is_dynamic(record)]


def _is_dynamic(record: TensorRecord) -> bool:
    return any(isinstance(dim, str) for dim in record.shape)


def _x(shape: Shape) -> str:
    return "x".join(map(str, shape))
