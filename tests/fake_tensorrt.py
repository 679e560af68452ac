"""A stand-in for the `tensorrt` package, to test what the project does around it.

The builder keeps what it was told; its plan is the graph itself, and a context runs that on ONNX Runtime through the
addresses it was given.  It checks what TensorRT would: shapes inside the profile, an address for every tensor, one shape
for every name of a dimension.  It says nothing about what TensorRT builds.
"""

from __future__ import annotations

import ctypes
import enum
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from socket_trt import names
from socket_trt.onnx.function import function_body
from socket_trt.runtime.onnxruntime_session import session_options
from tests.fake_cuda import FakeDriver
from tests.layer_bodies import layer_bodies

_NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.INT32: np.int32}


class DataType(enum.Enum):
    FLOAT = TensorProto.FLOAT
    HALF = TensorProto.FLOAT16
    INT32 = TensorProto.INT32
    INT64 = TensorProto.INT64


class LayerType(enum.Enum):
    SHUFFLE = "Transpose"
    MATRIX_MULTIPLY = "MatMul"
    CONSTANT = "Constant"
    CAST = "Cast"
    IDENTITY = "Identity"
    PLUGIN_V2 = " ".join((names.OPERATOR, *names.LAYERS))
    ELEMENTWISE = "Add Div Mul Sub"
    OTHER = ""


class Tensor(SimpleNamespace):
    """name, dtype, is_shape_tensor"""


class Layer:
    """A node as TensorRT's ILayer; what is set on it is written back to the node when the plan is built."""

    def __init__(self, node: onnx.NodeProto, tensors: dict[str, Tensor]) -> None:
        self.node = node
        self._inputs = [tensors[name] for name in node.input]
        self._outputs = [tensors[name] for name in node.output]
        self.type = next((kind for kind in LayerType if node.op_type in kind.value.split()), LayerType.OTHER)
        self.precision: DataType | None = None
        self.output_types: dict[int, DataType] = {}

    name = property(lambda self: self.node.name)
    num_inputs = property(lambda self: len(self._inputs))

    def get_input(self, index: int) -> Tensor:
        return self._inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self._outputs[index]

    def set_input(self, index: int, tensor: Tensor) -> None:
        self._inputs[index] = tensor

    def set_output_type(self, index: int, kind: DataType) -> None:
        self.output_types[index] = kind


class IMatrixMultiplyLayer(Layer):
    op1: Any = None


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.layers: list[Layer] = []
        self.model: onnx.ModelProto | None = None

    num_layers = property(lambda self: len(self.layers))

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def add_identity(self, source: Tensor) -> Layer:
        name = f"identity {len(self.layers)}"
        node = onnx.helper.make_node("Identity", [source.name], [name], name=name)
        self.layers.append(Layer(node, {source.name: source, name: Tensor(name=name, dtype=source.dtype)}))
        return self.layers[-1]


class FakeTensorRT:
    """The package.  `refuse`: what the builder answers with an error; `version` decides which interface there is."""

    DataType, LayerType, IMatrixMultiplyLayer = DataType, LayerType, IMatrixMultiplyLayer
    MatrixOperation = SimpleNamespace(TRANSPOSE="transpose")
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    class ILogger:
        """Base class for loggers."""

    def __init__(self, driver: FakeDriver, version: str = "8.6.0", refuse: str | None = None) -> None:
        self.__version__ = version
        self.driver = driver
        self.refuse = refuse
        self.built: list[Builder] = []
        self.contexts: list[Context] = []
        old = version.startswith("8.")
        self.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1)
        self.BuilderFlag = SimpleNamespace(FP16="fp16", OBEY_PRECISION_CONSTRAINTS="obey") if old else SimpleNamespace()
        self.PreviewFeature = (
            SimpleNamespace(PROFILE_SHARING_0806="sharing")
            if old
            else SimpleNamespace(ALIASED_PLUGIN_IO_10_03="aliased")
        )
        if not old:
            self.IProgressMonitor = FakeTensorRT.ILogger

    def Builder(self, logger: Any) -> Builder:  # noqa: N802
        self.built.append(Builder(self, logger))
        return self.built[-1]

    def OnnxParser(self, network: Network, logger: Any) -> Parser:  # noqa: N802
        return Parser(self, network)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self._deserialize(plan, logger))

    def _deserialize(self, plan: bytes, logger: Any) -> Engine | None:
        if not plan.startswith(b"{"):
            logger.log("Severity.ERROR", "magic tag does not match")
            return None
        return Engine(self, plan)


class Parser:
    def __init__(self, trt: FakeTensorRT, network: Network) -> None:
        self._trt, self._network = trt, network
        self._errors: list[Any] = []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def parse(self, data: bytes, path: str | None = None) -> bool:
        if self._trt.refuse == "parse":
            self._errors = [SimpleNamespace(node=lambda: 7, desc=lambda: "Plugin not found")]
            return False
        model = onnx.load_model_from_string(data)
        assert not model.functions
        for node in model.graph.node:
            if node.domain == names.DOMAIN:  # how the parser finds the plugin
                given = {a.name: a.s.decode() for a in node.attribute if a.name.startswith("plugin_")}
                assert given == {"plugin_version": "1", "plugin_namespace": names.DOMAIN}
        known = [*model.graph.input, *model.graph.output, *model.graph.value_info]
        kinds = {value.name: value.type.tensor_type.elem_type for value in known}
        kinds |= {initializer.name: initializer.data_type for initializer in model.graph.initializer}
        tensors = {name: Tensor(name=name, dtype=DataType(kind), is_shape_tensor=False) for name, kind in kinds.items()}
        self._network.model = model
        self._network.layers = [Layer(node, tensors) for node in model.graph.node]
        return True


class Config:
    def __init__(self) -> None:
        self.profiles: list[dict[str, Any]] = []
        self.flags: list[str] = []
        self.preview: dict[str, bool] = {}
        self.tactic_sources: int | None = None
        self.cache = b""
        self.progress_monitor: Any = None

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile.shapes)

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def set_tactic_sources(self, sources: int) -> None:
        self.tactic_sources = sources

    def set_preview_feature(self, feature: str, on: bool) -> None:
        self.preview[feature] = on

    def create_timing_cache(self, data: bytes) -> Any:
        return SimpleNamespace(data=data, serialize=lambda: b"fake cache:" + data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache.data and not cache.data.startswith(b"fake cache:"):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class Builder:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self._trt, self._logger = trt, logger
        self.config = Config()

    def create_network(self, flags: int) -> Network:
        self.network = Network(flags)
        return self.network

    def create_builder_config(self) -> Config:
        return self.config

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(
            shapes=shapes, set_shape=lambda name, *three: shapes.__setitem__(name, [list(s) for s in three])
        )

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        if self._trt.refuse == "build":
            self._logger.log("Severity.ERROR", "could not find any implementation")
            return None
        if config.progress_monitor is not None:
            config.progress_monitor.phase_start("Building Engine", None, 4)
            for step in range(4):
                assert config.progress_monitor.step_complete("Building Engine", step)
            config.progress_monitor.phase_finish("Building Engine")
        model = network.model
        assert model is not None
        ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.input}
        ranks |= {value.name: len(value.dims) for value in model.graph.initializer}
        ranks |= {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
        transposes = []
        for layer in network.layers:
            if isinstance(layer, IMatrixMultiplyLayer) and layer.op1 == "transpose":
                weight, name = layer.get_input(1).name, f"{layer.name}/transposed"
                transposes.append(
                    onnx.helper.make_node(
                        "Transpose",
                        [weight],
                        [name],
                        perm=[*range(ranks[weight] - 2), ranks[weight] - 1, ranks[weight] - 2],
                    )
                )
                layer.node.input[1] = name
        nodes = [*transposes, *(layer.node for layer in network.layers)]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        return json.dumps({"profiles": config.profiles}).encode() + b"\n" + model.SerializeToString()


class Engine:
    def __init__(self, trt: FakeTensorRT, plan: bytes) -> None:
        self.trt = trt
        header, _, data = plan.partition(b"\n")
        self.profiles = json.loads(header)["profiles"]
        model = onnx.load_model_from_string(data)
        model.functions.extend([function_body(model.opset_import[0].version), *layer_bodies()])
        self.inputs = {i.name: i.type.tensor_type for i in model.graph.input}
        self.outputs = [output.name for output in model.graph.output]
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
        )
        setattr(self, "device_memory_size" if trt.__version__.startswith("8.") else "device_memory_size_v2", 1 << 20)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def create_execution_context_without_device_memory(self) -> Context:
        assert self.trt.__version__.startswith("8.")
        return Context(self)

    def create_execution_context(self, strategy: str | None = None) -> Context:
        context = Context(self)
        if strategy is None:  # TensorRT's own memory, the first profile
            context.device_memory, context.profile = 1, 0
            return context
        assert not self.trt.__version__.startswith("8.")
        assert strategy == "user managed"
        return context


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile: int | None = None
        self.device_memory: int | None = None
        self.shape_changes = 0
        self.fail = False
        self.profiler: Any = None
        engine.trt.contexts.append(self)

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2  # type: ignore[attr-defined]
        self.device_memory = address

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return 0 <= index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, greatest = self.engine.profiles[self.profile][name]
        assert all(a <= b <= c for a, b, c in zip(least, shape, greatest, strict=True)), (name, shape, least, greatest)
        self.shapes[name] = tuple(shape)
        self.shape_changes += 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.inputs or name in self.engine.outputs
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        capturing = self.engine.trt.driver.streams[int(stream)] is not None
        if self.fail or (capturing and self.engine.trt.refuse == "capture"):
            return False
        assert self.device_memory
        if self.profiler is not None:
            self.profiler.report_layer_time("layer", 1.0)
        shapes = dict(self.shapes)
        self.engine.trt.driver.submit(stream, lambda: self._run(shapes))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]]) -> None:
        named: dict[str, int] = {}
        feeds = {}
        for name, kind in self.engine.inputs.items():
            declared = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
            shape = shapes.get(name) or tuple(declared)
            for dim, size in zip(declared, shape, strict=True):
                assert not isinstance(dim, str) or named.setdefault(dim, size) == size, (name, dim, size, named)
            feeds[name] = self._at(name, shape, _NUMPY[kind.elem_type]).copy()
        for name, array in zip(self.engine.outputs, self.engine.session.run(self.engine.outputs, feeds), strict=True):
            self._at(name, array.shape, array.dtype)[...] = array

    def _at(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_uint8 * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)
