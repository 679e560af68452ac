"""`engine.plan`: an engine directory's graph built by TensorRT for the GPU of this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from socket_trt import names
from socket_trt.engine.manifest import PLAN_FILE, EngineDirectory, Manifest, PlanRecord, TensorRecord
from socket_trt.engine.plan import build_plan, default_optimization_level, default_timing_cache
from socket_trt.engine.profiles import (
    DEFAULT_MAX_STEP_TOKENS,
    Profile,
    check_max_step_tokens,
    engine_profiles,
    pool_pages,
)
from socket_trt.errors import ConfigError, EngineError, MissingDependencyError
from socket_trt.onnx.network import NetworkGraph, embedded_graph, network_graph
from socket_trt.progress import Advance, Progress

if TYPE_CHECKING:
    from socket_trt.engine.tensorrt import TensorRT

NETWORK_FILE = "network.onnx"
NO_CUBLAS = "there is no cuBLAS 12 (libcublas.so.12): pip install nvidia-cublas-cu12"
# What the CUDA library has kernels for (plugins/include/socket_trt/kernels.h).
KERNEL_HEAD_SIZES = (64, 96, 128, 256)
MAX_GROUP = 16  # query heads of a KV head


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A plan, what it was built with, and the graph it was built from."""

    plan: bytes
    record: PlanRecord
    network: NetworkGraph


def compile_engine(
    engine: EngineDirectory,
    progress: Progress,
    max_step_tokens: int = DEFAULT_MAX_STEP_TOKENS,
    optimization_level: int | None = None,
    cublas: bool | None = None,
) -> Manifest:
    """Write `engine.plan` and `network.onnx`, the graph it was built from, and note both in the manifest.

    The options are those of `compile_graph`.

    Raises ConfigError for an engine or options that TensorRT cannot take, EngineError where it refuses the graph or the
    directory cannot be written, MissingDependencyError where there is no TensorRT.
    """
    if engine.manifest.backend != "tensorrt":
        raise ConfigError(f"{engine.path}: built for ONNX Runtime; build it with --backend tensorrt")
    engine.check_graph()
    engine.check_writable()
    from socket_trt.engine.tensorrt import open_tensorrt

    tensorrt = open_tensorrt()
    compiled = compile_graph(
        engine,
        tensorrt,
        progress,
        max_step_tokens=max_step_tokens,
        optimization_level=optimization_level,
        cublas=cublas,
    )
    _replace(engine.path / NETWORK_FILE, compiled.network.serialize())
    _replace(engine.path / PLAN_FILE, compiled.plan)
    engine.write(engine.manifest.model_copy(update={"plan": compiled.record}))
    return engine.manifest


def compile_graph(
    engine: EngineDirectory,
    tensorrt: TensorRT,
    progress: Progress,
    *,
    attributes: Mapping[str, int] | None = None,
    max_step_tokens: int = DEFAULT_MAX_STEP_TOKENS,
    optimization_level: int | None = None,
    cublas: bool | None = None,
) -> Compiled:
    """Build a plan of the engine's graph, with these `attributes` of every operator in place of its own.

    optimization_level  how long TensorRT searches, 0 to 5; by default what suits its version
    cublas              whether cuBLAS computes products; by default where TensorRT is 8.6 and cuBLAS is there

    Raises ConfigError and MissingDependencyError for a cuBLAS that is not used or not there.
    """
    manifest = engine.manifest
    check_plannable(engine, tensorrt.major)
    check_max_step_tokens(max_step_tokens, manifest.max_batch_size)
    max_pages = pool_pages(manifest)
    products = _cublas_version(tensorrt, cublas)
    begin = time.perf_counter()
    network = load_network(engine, tensorrt.major, attributes, cublas=products is not None)
    level = default_optimization_level(tensorrt.major) if optimization_level is None else optimization_level
    changed = ", ".join(f"{name}={value}" for name, value in (attributes or {}).items())
    with progress.task(f"Building the TensorRT plan{f' with {changed}' if changed else ''}", 1000) as advance:
        plan = build_plan(
            tensorrt.module,
            tensorrt.logger,
            network,
            manifest.graph.inputs,
            engine_profiles(manifest, max_step_tokens, max_pages),
            graph_path=engine.graph if manifest.weights.mode == "embedded" else None,
            timing_cache=default_timing_cache(tensorrt.module, tensorrt.gpu.name),
            optimization_level=level,
            watch=_Watcher(advance),
        )
    record = PlanRecord(
        file=PLAN_FILE,
        sha256=hashlib.sha256(plan).hexdigest(),
        tensorrt=tensorrt.version,
        gpu=tensorrt.gpu.name,
        compute_capability=tensorrt.gpu.compute_capability,
        plugin=tensorrt.plugin.path.name,
        plugin_release=tensorrt.plugin.release,
        plugin_sha256=tensorrt.plugin.sha256,
        max_step_tokens=max_step_tokens,
        max_pages=max_pages,
        optimization_level=level,
        cublas=products,
        build_seconds=round(time.perf_counter() - begin, 2),
    )
    return Compiled(plan, record, network)


def compile_variant(
    engine: EngineDirectory, tensorrt: TensorRT, progress: Progress, attributes: Mapping[str, int]
) -> Compiled:
    """`compile_graph` with other `attributes`, and all else as the engine's own plan has it, where there is one."""
    plan = engine.manifest.plan
    if plan is None:
        return compile_graph(engine, tensorrt, progress, attributes=attributes)
    return compile_graph(
        engine,
        tensorrt,
        progress,
        attributes=attributes,
        max_step_tokens=plan.max_step_tokens,
        optimization_level=plan.optimization_level,
        cublas=plan.cublas is not None,
    )


def load_network(
    engine: EngineDirectory, major: int, attributes: Mapping[str, int] | None = None, *, cublas: bool = False
) -> NetworkGraph:
    """The graph for the parser of this major version of TensorRT; `attributes` and `cublas`: see `compile_graph`."""
    model = ir.load(engine.graph)
    for node in model.graph:
        if (node.domain, node.op_type) == (names.DOMAIN, names.OPERATOR):
            for name, value in (attributes or {}).items():
                node.attributes[name] = ir.AttrInt64(name, value)
    prepare = embedded_graph if engine.manifest.weights.mode == "embedded" else network_graph
    return prepare(model, opset17=major < 10, cublas=cublas)


def _cublas_version(tensorrt: TensorRT, wanted: bool | None) -> str | None:
    """Version of the cuBLAS that is to compute products; None: TensorRT computes them."""
    found = tensorrt.plugin.cublas
    if wanted and tensorrt.major >= 10:
        raise ConfigError(f"--cublas: TensorRT {tensorrt.version} computes products itself; only 8.6 has cuBLAS do it")
    if wanted and found is None:
        raise MissingDependencyError(f"{NO_CUBLAS}, or leave products to TensorRT (socket-trt compile --no-cublas)")
    return None if wanted is False else found


def check_plannable(engine: EngineDirectory, major: int) -> None:
    """Raise ConfigError for what TensorRT of this major version cannot compute."""
    manifest = engine.manifest
    model = manifest.model
    if model.head_size not in KERNEL_HEAD_SIZES or model.query_heads > MAX_GROUP * model.kv_heads:
        raise ConfigError(
            f"{engine.path}: {model.query_heads} query heads over {model.kv_heads} KV heads of size {model.head_size}; the "
            f"plugin has kernels for head sizes {', '.join(map(str, KERNEL_HEAD_SIZES))} and {MAX_GROUP} query heads a KV "
            "head at most: build with --backend onnxruntime"
        )
    if manifest.dtype == "float32":
        raise ConfigError(
            f"{engine.path}: float32; the plugin computes in float16 or bfloat16: build with --dtype float16"
        )
    if major < 10 and manifest.dtype == "bfloat16":
        raise ConfigError(f"{engine.path}: bfloat16, which TensorRT 8.6 does not know: build with --dtype float16")
    if major < 10 and manifest.weights.mode == "embedded":
        stored = {record.dtype for record in _embedded_types(engine)}
        if "bfloat16" in stored:
            raise ConfigError(
                f"{engine.path}: embeds bfloat16 weights, which TensorRT 8.6 does not know: build with --weights external"
            )


def _embedded_types(engine: EngineDirectory) -> list[TensorRecord]:
    model = ir.load(engine.graph)
    return [
        TensorRecord(name=name, dtype=value.const_value.dtype.name.lower(), shape=[])
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    ]


class _Watcher:
    """The builder's phases as one bar of 1000: the outermost phase counts, the others are within it."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._outermost, self._shown = advance, "", 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        self._outermost = self._outermost or phase
        if phase == self._outermost and total:
            reached = 1000 * done // total
            self._advance(max(0, reached - self._shown))
            self._shown = max(self._shown, reached)


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise EngineError(f"{path}: cannot be written ({error.strerror})") from None


def plan_profiles(manifest: Manifest, record: PlanRecord) -> list[Profile]:
    """The profiles that a recorded plan was built with, in order."""
    return engine_profiles(manifest, record.max_step_tokens, record.max_pages)
