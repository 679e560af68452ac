"""The same plan by NVIDIA's own tools: command lines of `trtexec` and `polygraphy run`, for whoever debugs a build.

Both take `network.onnx`, the graph that the plan was built from.  They differ from the build in three things: only the
build lets matrix products read weights without a transpose, and on TensorRT 8.6 only the build leaves casts out and the tools
are told the types of layers by name.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from socket_trt.engine.compile import NETWORK_FILE, load_network, plan_profiles
from socket_trt.engine.manifest import EngineDirectory, Manifest, PlanRecord, TensorRecord
from socket_trt.engine.plugin import autoload_name, find_plugin
from socket_trt.engine.profiles import Profile, Shape
from socket_trt.errors import EngineError, MissingDependencyError
from socket_trt.onnx.network import NetworkGraph

_SHAPE_OPTIONS = ("min", "opt", "max")
_FREE = ("Cast", "Constant", "Identity", "SocketAttention")


def build_commands(engine: EngineDirectory) -> dict[str, str]:
    """Command lines by tool, for an engine that has a plan.  Raises EngineError where it has none."""
    manifest, record = engine.manifest, engine.manifest.plan
    if record is None:
        raise EngineError(f"{engine.path}: has no TensorRT plan yet; run socket-trt compile {engine.path}")
    try:
        plugin = find_plugin(record.tensorrt)
    except MissingDependencyError:
        plugin = Path(record.plugin)
    autoload = plugin.with_name(autoload_name(_major(record)))
    held = float32_layers(load_network(engine, 8, cublas=record.cublas is not None)) if _major(record) < 10 else []
    network = engine.path / NETWORK_FILE
    return {
        "trtexec": trtexec_command(manifest, record, network, plugin, held),
        "polygraphy": polygraphy_command(manifest, record, network, autoload, held),
    }


def float32_layers(graph: NetworkGraph) -> list[str]:
    """Names of the layers that the build holds to float32 on TensorRT 8.6."""
    nodes = (node for node in graph.model.graph if node.op_type not in _FREE)
    return [str(node.name) for node in nodes if node.outputs[0].name in graph.float32]


def trtexec_command(
    manifest: Manifest, record: PlanRecord, network: Path, plugin: Path, float32_layers: list[str]
) -> str:
    """`trtexec` for this plan.

    plugin          the library that TensorRT's registry loads
    float32_layers  names of layers that TensorRT 8.6 is held to float32 in
    """
    parts = ["trtexec", f"--onnx={network}", f"--saveEngine={network.with_name(record.file)}"]
    major = _major(record)
    parts.append(f"--dynamicPlugins={plugin}")
    for index, profile in enumerate(plan_profiles(manifest, record)):
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
    parts += [f"--builderOptimizationLevel={record.optimization_level}"]
    parts += ["--profilingVerbosity=detailed", "--skipInference"]
    return shlex.join(parts)


def polygraphy_command(
    manifest: Manifest, record: PlanRecord, network: Path, autoload: Path, float32_layers: list[str]
) -> str:
    """`polygraphy run` that builds this plan and runs it once on inputs of its own.

    autoload  the library that registers the plugin when it is opened, which is all that Polygraphy does with it
    """
    parts = ["polygraphy", "run", str(network), "--trt", "--plugins", str(autoload)]
    for profile in plan_profiles(manifest, record):
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
    parts += ["--builder-optimization-level", str(record.optimization_level)]
    parts += ["--profiling-verbosity", "DETAILED", "--save-engine", str(network.with_name(record.file))]
    return shlex.join(parts)


def _major(record: PlanRecord) -> int:
    return int(record.tensorrt.split(".")[0])


def _dynamic(manifest: Manifest, profile: Profile) -> list[tuple[str, tuple[Shape, Shape, Shape]]]:
    return [(record.name, profile.shapes(record)) for record in manifest.graph.inputs if _is_dynamic(record)]


def _is_dynamic(record: TensorRecord) -> bool:
    return any(isinstance(dim, str) for dim in record.shape)


def _x(shape: Shape) -> str:
    return "x".join(map(str, shape))
