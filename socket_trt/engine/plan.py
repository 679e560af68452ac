"""ONNX graph -> TensorRT network -> serialized plan, for TensorRT 8.6, 10 and 11.

10 and 11 build strongly typed networks: every type is the graph's.  8.6 chooses types itself, so each layer is held to
the type that the graph gives its output: float16, and float32 for norms, rotary tables and logits.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from socket_trt.engine.manifest import TensorRecord
from socket_trt.engine.profiles import Profile, Shape
from socket_trt.errors import EngineError
from socket_trt.onnx.network import NetworkGraph

_LOG = logging.getLogger("socket_trt.tensorrt")
# Below Python's own, so that nothing shows unasked: errors come back as exceptions.
_LEVELS = {"WARNING": logging.INFO, "INFO": logging.DEBUG, "VERBOSE": logging.DEBUG - 5}

# Told of the builder's phases: name of the phase, steps done, steps in all.
Watch = Callable[[str, int, int], None]
# Least, best and greatest shape by input.
Shapes = Mapping[str, tuple[Shape, Shape, Shape]]


def major_version(trt: Any) -> int:
    return int(trt.__version__.split(".")[0])


def make_logger(trt: Any) -> Any:
    """A logger for TensorRT that passes to Python's logging and keeps the latest errors in `errors`."""
    verbose = getattr(trt.ILogger, "VERBOSE", None)
    log_verbose = _LOG.isEnabledFor(_LEVELS["VERBOSE"])

    class Logger(trt.ILogger):  # type: ignore[misc]  # TensorRT has no types here
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity == verbose and not log_verbose:  # hundreds of thousands of them in a build
                return
            level = str(severity).rsplit(".", 1)[-1]
            if level not in _LEVELS:
                self.errors = [*self.errors[-19:], message]
            _LOG.log(_LEVELS.get(level, logging.INFO), "%s", message)

        def explain(self) -> str:
            """The latest errors as one line, and forget them."""
            text, self.errors = "; ".join(dict.fromkeys(self.errors[-3:])), []
            return " ".join(text.split()) or "it gives no reason"

    return Logger()


def build_plan(
    trt: Any,
    logger: Any,
    graph: NetworkGraph,
    inputs: Sequence[TensorRecord],
    profiles: Sequence[Profile],
    **options: Any,
) -> bytes:
    """`build_network_plan` for an engine's graph: `inputs` with symbolic dimensions, weights left out."""
    dynamic = [record for record in inputs if any(isinstance(dim, str) for dim in record.shape)]
    shapes = [{record.name: profile.shapes(record) for record in dynamic} for profile in profiles]
    return build_network_plan(trt, logger, graph, shapes, **options)


def build_network_plan(
    trt: Any,
    logger: Any,
    graph: NetworkGraph,
    profiles: Sequence[Shapes],
    *,
    graph_path: Path | None = None,
    timing_cache: Path | None = None,
    optimization_level: int | None = None,
    watch: Watch | None = None,
) -> bytes:
    """Build `graph` for the current GPU.

    profiles      least, best and greatest shape of every input of varying size, for each profile
    graph_path    where the graph's embedded weights are found beside
    timing_cache  file that remembers how fast kernels are; written after the build
    optimization_level  how long the builder searches, 0 to 5; None: TensorRT's own default
    watch         told of progress, by TensorRT 10 and later

    Raises EngineError with TensorRT's own words where it refuses.
    """
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parse(trt, logger, network, graph, graph_path)
    transpose_in_product(trt, network, frozenset(graph.transposed))
    config = builder.create_builder_config()
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, best, greatest) in shapes.items():
            profile.set_shape(name, least, best, greatest)
        config.add_optimization_profile(profile)
    _configure(trt, config)
    if optimization_level is not None:
        config.builder_optimization_level = optimization_level
    if major_version(trt) < 10:
        hold_types(trt, network, graph)
        leave_out_casts(trt, network)
    cache = _load_timing_cache(config, timing_cache)
    if watch is not None and hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, watch)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot build this graph: {logger.explain()}")
    if cache is not None and timing_cache is not None:
        _write(timing_cache, bytes(memoryview(config.get_timing_cache().serialize())))
    return bytes(memoryview(plan))


def default_optimization_level(major: int) -> int:
    """TensorRT's own, 3, but for 8.6: its level 3 compiles and times some hundred kernels for every fused
    pointwise layer, minutes for a plan; level 2 takes precompiled ones.
    """
    return 2 if major < 10 else 3


def _network_flags(trt: Any) -> int:
    """Explicit batch where it must be asked for, strong types where they can be."""
    flags = trt.NetworkDefinitionCreationFlag
    major = major_version(trt)
    if major < 10:
        return 1 << int(flags.EXPLICIT_BATCH)
    return 1 << int(flags.STRONGLY_TYPED) if major == 10 else 0


def parse(trt: Any, logger: Any, network: Any, graph: NetworkGraph, graph_path: Path | None) -> None:
    """Parse the graph into `network`.  Raises EngineError with the parser's words."""
    parser = trt.OnnxParser(network, logger)
    path = {} if graph_path is None else {"path": str(graph_path)}
    if not parser.parse(graph.serialize(), **path):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = [f"node {error.node()}: {error.desc()}" for error in errors] or [logger.explain()]
        raise EngineError(f"TensorRT {trt.__version__} cannot parse this graph: {' '.join('; '.join(reasons).split())}")


def transpose_in_product(trt: Any, network: Any, transposed: frozenset[str]) -> None:
    """Let matrix products read weights as they are stored, [outputs, inputs], instead of a transposed copy."""
    sources: dict[str, Any] = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.SHUFFLE and layer.get_output(0).name in transposed:
            sources[layer.get_output(0).name] = layer.get_input(0)
        elif layer.type == trt.LayerType.MATRIX_MULTIPLY and layer.get_input(1).name in sources:
            source = sources[layer.get_input(1).name]
            layer.__class__ = trt.IMatrixMultiplyLayer
            layer.op1 = trt.MatrixOperation.TRANSPOSE
            layer.set_input(1, source)


def hold_types(trt: Any, network: Any, graph: NetworkGraph) -> None:
    """Hold every floating-point layer of a weakly typed network to the type that the graph gives its output."""
    types = dict.fromkeys(graph.float32, trt.DataType.FLOAT) | dict.fromkeys(graph.float16, trt.DataType.HALF)
    free = {trt.LayerType.CONSTANT, trt.LayerType.CAST, trt.LayerType.IDENTITY, trt.LayerType.PLUGIN_V2}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        output = layer.get_output(0)
        # Layers that the parser adds between those of the graph pass on what they get.
        kind = types.get(output.name) or types.get(layer.get_input(0).name if layer.num_inputs else "")
        if layer.type in free or kind is None or output.dtype not in (trt.DataType.FLOAT, trt.DataType.HALF):
            continue
        types[output.name] = kind
        layer.precision = kind
        layer.set_output_type(0, kind)


def leave_out_casts(trt: Any, network: Any) -> None:
    """Let elementwise layers read what a cast between float16 and float32 reads: held to a type, they convert themselves.

    TensorRT 8.6 compiles every such cast by itself, 0.3 s each, and there are some hundred around the norms of 32 layers.
    Other layers keep theirs: what it fuses has no implementation of a product or a shuffle between two types.
    """
    floating = {trt.DataType.FLOAT, trt.DataType.HALF}
    readers: dict[str, list[tuple[Any, int]]] = {}
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    for layer in layers:
        if layer.type == trt.LayerType.ELEMENTWISE:
            for index in range(layer.num_inputs):
                readers.setdefault(layer.get_input(index).name, []).append((layer, index))
    for cast in layers:
        if cast.type != trt.LayerType.CAST or not {cast.get_input(0).dtype, cast.get_output(0).dtype} <= floating:
            continue
        source, reads = cast.get_input(0), readers.get(cast.get_output(0).name, [])
        if cast.get_output(0).dtype == trt.DataType.FLOAT and len({layer.name for layer, _ in reads}) > 1:
            # Hidden states, which a norm squares and scales: a copy in float32 by a kernel that needs no compiling.
            copy = network.add_identity(source)
            copy.set_output_type(0, trt.DataType.FLOAT)
            source = copy.get_output(0)
        for layer, index in reads:
            layer.set_input(index, source)


def _configure(trt: Any, config: Any) -> None:
    if major_version(trt) < 10:
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        config.set_tactic_sources(0)  # TensorRT's own kernels: cuBLAS 12 and cuDNN 8 need not be there
    if hasattr(trt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03"):
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)  # caches are updated in place
    if major_version(trt) < 10:  # later ones always share
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)  # a context for each captured graph
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def _monitor(trt: Any, watch: Watch) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            watch(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            watch(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            total = self._steps.pop(phase_name, 0)
            watch(phase_name, total, total)

    return Monitor()


def default_timing_cache(trt: Any, gpu: str) -> Path:
    """The user's timing cache for this TensorRT on this GPU."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "socket-trt" / f"timing-{trt.__version__}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.cache"


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    """Attach the cache in `path`, or an empty one where there is none or it belongs to another GPU or TensorRT."""
    if path is None:
        return None
    data = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _write(path: Path, data: bytes) -> None:
    """Replace a cache file at once; one that cannot be written is no reason to fail a build."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        Path(file.name).replace(path)
    except OSError as error:
        _LOG.warning("%s: not written (%s)", path, error.strerror)
