"""A session on ONNX Runtime's CPU: everything but speed."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from socket_trt import names
from socket_trt.engine.manifest import EngineDirectory, Manifest
from socket_trt.errors import EngineError
from socket_trt.runtime.session import FloatArray, Session, SessionLimits, StepBatch
from socket_trt.weights import map_tensor

# TensorProto's numbers, for weights that are stored in another type than NumPy knows.
_ONNX_TYPE = {"F32": 1, "F16": 10, "BF16": 16, "F64": 11}
_NUMPY_DTYPE = {"float32": np.float32, "float16": np.float16}


def session_options() -> ort.SessionOptions:
    """How the project runs ONNX Runtime everywhere."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # warnings speak of its own optimiser
    # The level above is for the layout of convolutions, and crashes while folding constants of float16 Gemma2 graphs.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    # Threads that wait sleep: spinning starves whatever else runs on the machine, other sessions first.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_inference_session(engine: EngineDirectory, graph: bytes | None = None) -> ort.InferenceSession:
    """ONNX Runtime's session over the engine's graph, its weights mapped from where they lie.

    `graph` is another graph with the same weights (validation runs variants of the engine's own).
    Raises EngineError where ONNX Runtime refuses the graph.
    """
    options = session_options()
    weights = engine.manifest.weights
    if weights.mode == "external":
        values = [
            ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                map_tensor(engine.weights_directory, location), _ONNX_TYPE[location.dtype]
            )
            for location in weights.tensors.values()
        ]
        options.add_external_initializers(list(weights.tensors), values)
    if graph is not None:  # its embedded weights are found beside the engine's graph
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(engine.path))
    try:
        return ort.InferenceSession(graph or str(engine.graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        reason = str(error).splitlines()[0][:200]
        raise EngineError(f"{engine.graph}: ONNX Runtime {ort.__version__} cannot run this graph ({reason})") from error


class OnnxRuntimeSession(Session):
    """Runs the engine's graph on the CPU; the caches are updated in place."""

    def __init__(self, engine: EngineDirectory, num_pages: int | None = None, graph: bytes | None = None) -> None:
        """`num_pages`: size of the pool, the manifest's by default.  `graph`: see `open_inference_session`."""
        engine.check()
        manifest = engine.manifest
        if manifest.dtype not in _NUMPY_DTYPE:
            raise EngineError(f"{engine.path}: ONNX Runtime on CPU has no {manifest.dtype}; build with --dtype float32")
        self._limits = manifest.limits(num_pages)
        self._session = open_inference_session(engine, graph)
        self._caches = allocate_caches(manifest, self._limits.num_pages)

    @property
    def limits(self) -> SessionLimits:
        return self._limits

    def step(self, batch: StepBatch) -> FloatArray:
        binding = self._session.io_binding()
        for name in names.STEP_INPUTS:
            binding.bind_cpu_input(name, getattr(batch, name))
        for (layer, kind), cache in self._caches.items():
            # One buffer in and out: the operator's scatters then write only what changes.
            binding.bind_ortvalue_input(names.past(layer, kind), cache)
            binding.bind_ortvalue_output(names.present(layer, kind), cache)
        binding.bind_output(names.LOGITS, "cpu")
        self._session.run_with_iobinding(binding)
        logits: FloatArray = binding.get_outputs()[-1].numpy()
        return logits


def allocate_caches(manifest: Manifest, num_pages: int) -> dict[tuple[int, str], ort.OrtValue]:
    """Zeroed caches by layer and kind; memory is taken as pages are first written."""
    shapes = manifest.cache_shapes(num_pages)
    dtypes = dict.fromkeys(names.CACHE_KINDS, _NUMPY_DTYPE[manifest.dtype]) | {"code": np.int32}
    return {
        (layer, kind): ort.OrtValue.ortvalue_from_numpy(np.zeros(shapes[kind], dtypes[kind]))
        for layer in range(manifest.model.layers)
        for kind in names.CACHE_KINDS
    }
