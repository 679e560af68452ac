"""A session on TensorRT through cuda-python: no PyTorch, weights once on the GPU, caches updated in place.

Steps in which every row has one token are replayed as CUDA graphs, one for each batch size and width of the page table.
A graph is bound to the execution context it was captured from, so each has a context of its own; all contexts share one
block of memory for activations, since one step runs at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import OrderedDict
from typing import Any, Protocol, TypeVar

import numpy as np

from socket_trt import names
from socket_trt.engine.compile import NO_CUBLAS, Compiled, plan_profiles
from socket_trt.engine.manifest import EngineDirectory, PlanRecord
from socket_trt.engine.tensorrt import TensorRT, open_tensorrt
from socket_trt.errors import ConfigError, EngineError, RequestError
from socket_trt.onnx.joined import parts_of
from socket_trt.progress import Progress, Silent
from socket_trt.runtime.cuda import Device, DeviceBuffer, Event, Graph, OutOfGpuMemoryError, PinnedBuffer, Stream
from socket_trt.runtime.device_weights import DeviceWeights, fill_randomly, load_weights, weight_bytes
from socket_trt.runtime.session import FloatArray, Session, SessionLimits, StepBatch

_LOG = logging.getLogger("socket_trt.tensorrt")
# Left free for what the driver and TensorRT allocate on their own: kernels, graphs, contexts.
RESERVE_BYTES = 1 << 30
MAX_DECODE_CONTEXTS = 32
# The page table comes last: its used part ends what is copied to the GPU before a step.
_STEP_ORDER = (*(name for name in names.STEP_INPUTS if name != names.PAGE_TABLE), names.PAGE_TABLE)


class _Freeable(Protocol):
    def free(self) -> None: ...


_Resource = TypeVar("_Resource", bound=_Freeable)


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Sizes of a step: N tokens in B rows, a page table of `width` columns."""

    tokens: int
    rows: int
    width: int

    def of(self, name: str) -> tuple[int, ...]:
        """Shape of one of `names.STEP_INPUTS`."""
        return {
            names.INPUT_IDS: (self.tokens,),
            names.POSITION_IDS: (self.tokens,),
            names.LOGITS_INDICES: (self.rows,),
            names.PAST_LENGTH: (self.rows,),
            names.QUERY_START: (self.rows + 1,),
            names.PAGE_TABLE: (self.rows, self.width),
        }[name]


@dataclasses.dataclass
class _Decoder:
    """Decode steps of one shape: their context, and its graph once the first step has run and could be captured."""

    context: Any
    graph: Graph | None = None
    capturable: bool = True


class TensorRTSession(Session):
    """Runs an engine's plan on the GPU it was built for."""

    def __init__(
        self,
        engine: EngineDirectory,
        num_pages: int | None = None,
        *,
        ordinal: int = 0,
        compiled: Compiled | None = None,
        random_weights: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Load the plan, check that everything fits, then fill the weights.

        num_pages       size of the pool; by default a full batch of full sequences, or as much of it as fits
        ordinal         the GPU, as the process counts those it sees
        compiled        another plan of the same weights and caches (validation and benchmarks run variants)
        random_weights  fill the weights with random values, for speed alone; the checkpoint need not be there

        Raises EngineError for a plan of another TensorRT, GPU or plugin, OutOfGpuMemoryError before anything big is
        loaded, CheckpointError for a checkpoint that changed.
        """
        manifest = engine.manifest
        record = manifest.plan if compiled is None else compiled.record
        if record is None:
            raise EngineError(f"{engine.path}: has no TensorRT plan yet; run socket-trt compile {engine.path}")
        if random_weights and not manifest.weights.tensors:
            raise ConfigError(
                f"{engine.path}: its weights are embedded in the plan; random ones need --weights external"
            )
        if random_weights:
            engine.check_graph()
        else:
            engine.check()
        tensorrt = open_tensorrt()
        device = Device(ordinal)  # the one before, if it was opened just now, made the first GPU current
        check_compatible(engine, record, tensorrt)
        plan = read_plan(engine, record) if compiled is None else compiled.plan
        self._trt, self._device, self._manifest, self._record = tensorrt, device, manifest, record
        self._owned: list[_Freeable] = []
        self._decoders: OrderedDict[StepShape, _Decoder] = OrderedDict()
        try:
            self._open(plan, num_pages)
            self._fill(engine, random_weights, progress or Silent())
        except BaseException:
            self.close()
            raise

    def _open(self, plan: bytes, num_pages: int | None) -> None:
        self._runtime = self._trt.module.Runtime(self._trt.logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"TensorRT {self._trt.version} cannot load the plan: {self._trt.logger.explain()}")
        manifest, record = self._manifest, self._record
        self._profiles = plan_profiles(manifest, record)
        activations = int(
            self._engine.device_memory_size if self._trt.major < 10 else self._engine.device_memory_size_v2
        )
        largest = StepShape(record.max_step_tokens, manifest.max_batch_size, manifest.limits().pages_per_sequence)
        self._offsets, step_bytes = _step_layout(largest)
        logits_bytes = 4 * manifest.max_batch_size * manifest.model.vocabulary_size
        fixed = weight_bytes(manifest) + activations + step_bytes + logits_bytes
        self._limits = manifest.limits(self._pool_size(fixed, num_pages))

        self._stream = self._own(Stream())
        inputs = {name: parts_of(name) for name in self._weight_inputs()}
        self._weights = self._own(DeviceWeights(manifest, inputs.values()))
        self._weight_addresses = {name: self._weights.addresses[parts[0]] for name, parts in inputs.items()}
        self._activations = self._own(DeviceBuffer(activations))
        self._step_device, self._step_host = self._own(DeviceBuffer(step_bytes)), self._own(PinnedBuffer(step_bytes))
        self._logits_device = self._own(DeviceBuffer(logits_bytes))
        self._logits_host = self._own(PinnedBuffer(logits_bytes))
        shapes = manifest.cache_shapes(self._limits.num_pages)
        self.caches = {
            (layer, kind): self._own(
                DeviceBuffer(int(np.prod(shapes[kind], dtype=np.int64)) * (4 if kind == "code" else 2))
            )
            for layer in range(manifest.model.layers)
            for kind in names.CACHE_KINDS
        }
        for cache in self.caches.values():
            self._stream.zero(cache.address, cache.size)
        self._began, self._ended = self._own(Event()), self._own(Event())
        self._prefill = self._context(len(self._profiles) - 1)
        self._prefill_shape: StepShape | None = None

    def _weight_inputs(self) -> list[str]:
        """Inputs of the plan that are neither the step's nor caches."""
        graph = self._manifest.graph
        own = {record.name for record in (*graph.inputs, *graph.outputs)}
        tensors = (self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors))
        return [name for name in tensors if name not in own]

    def _pool_size(self, fixed: int, wanted: int | None) -> int:
        """Pages of the pool.  Raises OutOfGpuMemoryError where the wanted ones, or not even one sequence's, fit."""
        manifest = self._manifest
        free, total = self._device.memory()
        page = manifest.cache_bytes_per_page()
        fitting = (free - RESERVE_BYTES - fixed) // page
        least = 1 + manifest.limits().pages_per_sequence if wanted is None else wanted
        most = min(manifest.limits().num_pages, self._record.max_pages) if wanted is None else wanted
        if wanted is not None and not 2 <= wanted <= self._record.max_pages:
            raise ConfigError(f"a pool of {wanted} pages: the plan takes 2 to {self._record.max_pages}")
        if fitting < least:
            raise OutOfGpuMemoryError(
                f"the GPU has {free / 2**30:.1f} GiB free of {total / 2**30:.1f}; this engine needs {fixed / 2**30:.1f} "
                f"GiB for weights and activations, {least * page / 2**30:.1f} GiB for {least} cache pages and "
                f"{RESERVE_BYTES / 2**30:.0f} GiB to spare: free memory, or build with a smaller --max-seq-len"
            )
        return int(min(most, fitting))

    def _own(self, resource: _Resource) -> _Resource:
        self._owned.append(resource)
        return resource

    def _fill(self, engine: EngineDirectory, random_weights: bool, progress: Progress) -> None:
        if random_weights:
            with progress.task("Drawing random weights on the GPU"):
                fill_randomly(self._manifest, self._weights, self._stream)
        elif self._manifest.weights.tensors:
            load_weights(engine, self._weights, self._stream, progress)

    @property
    def limits(self) -> SessionLimits:
        return self._limits

    @property
    def stream(self) -> Stream:
        return self._stream

    @property
    def record(self) -> PlanRecord:
        """What the plan was built with."""
        return self._record

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of GPU memory by purpose."""
        return {
            "weights": self._weights.size,
            "activations": self._activations.size,
            "caches": sum(cache.size for cache in self.caches.values()),
        }

    @property
    def gpu_milliseconds(self) -> float:
        """Time the last step took on the GPU, copies of its inputs and logits included."""
        return self._ended.milliseconds_since(self._began)

    def step(self, batch: StepBatch) -> FloatArray:
        self._device.activate()
        shape = self._shape(batch)
        self._write_inputs(batch, shape)
        decode = shape.tokens == shape.rows
        decoder = self._decoder(shape) if decode else None
        self._began.record(self._stream)
        if decoder is None:
            self._set_shapes(self._prefill, shape, self._prefill_shape)
            self._prefill_shape = shape
            self._enqueue(self._prefill, shape)
        elif decoder.graph is None:
            self._enqueue(decoder.context, shape)
        else:
            decoder.graph.launch(self._stream)
        self._ended.record(self._stream)
        self._stream.synchronize()
        if decoder is not None and decoder.graph is None and decoder.capturable:
            self._capture(decoder, shape)
        rows = self._logits_host.bytes[: 4 * shape.rows * self._limits.vocabulary_size]
        logits: FloatArray = rows.view(np.float32).reshape(shape.rows, -1)
        logits.flags.writeable = False  # not copied: 16 rows of 128,256 tokens would take 0.7 ms
        return logits

    def _capture(self, decoder: _Decoder, shape: StepShape) -> None:
        """Make the graph of a decode shape, now that its context has seen the shape; capturing runs nothing."""
        try:
            decoder.graph = self._stream.capture(lambda: self._enqueue(decoder.context, shape))
        except EngineError as error:
            decoder.capturable = False
            _LOG.warning("decode steps of %d rows are not replayed as a graph, and slower: %s", shape.rows, error)

    def profile(self, batch: StepBatch, runs: int = 5) -> list[tuple[str, float]]:
        """Milliseconds of each layer of the plan in a decode step, mean of `runs`, in the order of execution.

        TensorRT waits after each layer, so their sum is more than a step takes.
        """
        trt, times = self._trt.module, dict[str, float]()

        class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]  # TensorRT has no types here
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times[layer_name] = times.get(layer_name, 0.0) + ms / runs

        self.step(batch)
        shape = self._shape(batch)
        context = self._context(self._decode_profile(shape))
        self._set_shapes(context, shape, None)
        self._enqueue(context, shape)
        self._stream.synchronize()
        profiler = Profiler()
        context.profiler = profiler
        for _ in range(runs):
            self._enqueue(context, shape)
            self._stream.synchronize()
        return list(times.items())

    def close(self) -> None:
        """Free the GPU's memory; the session cannot be used afterwards."""
        if not self._owned:
            return
        self._device.activate()
        self._device.synchronize()
        for decoder in self._decoders.values():
            if decoder.graph is not None:
                decoder.graph.free()
        self._decoders.clear()
        self._prefill = None
        self._engine = None
        self._runtime = None
        while self._owned:
            self._owned.pop().free()

    def _shape(self, batch: StepBatch) -> StepShape:
        """Sizes of the step.  Raises RequestError for one that the plan was not built for."""
        tokens, rows = len(batch.input_ids), len(batch.past_length)
        if tokens > self._record.max_step_tokens or rows > self._limits.max_batch_size:
            raise RequestError(
                f"a step of {tokens} tokens in {rows} rows: this plan takes {self._record.max_step_tokens} in "
                f"{self._limits.max_batch_size}"
            )
        longest = int((batch.past_length + np.diff(batch.query_start)).max())
        return StepShape(tokens, rows, table_width(longest, self._limits))

    def _write_inputs(self, batch: StepBatch, shape: StepShape) -> None:
        for name in names.STEP_INPUTS:
            array = getattr(batch, name)
            if name == names.PAGE_TABLE:
                array = array[:, : shape.width]
            target = self._step_host.bytes[self._offsets[name] :][: 4 * array.size].view(np.int32)
            target.reshape(array.shape)[:] = array

    def _decoder(self, shape: StepShape) -> _Decoder:
        """The context, and graph if there is one, of a decode shape; those used least recently make room."""
        decoder = self._decoders.get(shape)
        if decoder is None:
            if len(self._decoders) >= MAX_DECODE_CONTEXTS:
                _, oldest = self._decoders.popitem(last=False)
                if oldest.graph is not None:
                    oldest.graph.free()
            decoder = self._decoders[shape] = _Decoder(self._context(self._decode_profile(shape)))
            self._set_shapes(decoder.context, shape, None)
        self._decoders.move_to_end(shape)
        return decoder

    def _decode_profile(self, shape: StepShape) -> int:
        return next(i for i, profile in enumerate(self._profiles) if shape.rows <= profile.sequences.maximum)

    def _context(self, profile: int) -> Any:
        """An execution context with every address bound."""
        if self._trt.major < 10:
            context = self._engine.create_execution_context_without_device_memory()
        else:
            strategy = self._trt.module.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(f"TensorRT cannot create an execution context: {self._trt.logger.explain()}")
        if self._trt.major < 10:
            context.device_memory = self._activations.address
        else:
            context.set_device_memory(self._activations.address, self._activations.size)
        self._check(context.set_optimization_profile_async(profile, self._stream.handle))
        self._stream.synchronize()
        shapes = self._manifest.cache_shapes(self._limits.num_pages)
        for (layer, kind), cache in self.caches.items():
            self._check(context.set_input_shape(names.past(layer, kind), shapes[kind]))
            for name in (names.past(layer, kind), names.present(layer, kind)):
                self._check(context.set_tensor_address(name, cache.address))
        for name in names.STEP_INPUTS:
            self._check(context.set_tensor_address(name, self._step_device.address + self._offsets[name]))
        for name, address in self._weight_addresses.items():
            self._check(context.set_tensor_address(name, address))
        self._check(context.set_tensor_address(names.LOGITS, self._logits_device.address))
        return context

    def _set_shapes(self, context: Any, shape: StepShape, current: StepShape | None) -> None:
        for name in names.STEP_INPUTS:
            if current is None or shape.of(name) != current.of(name):
                self._check(context.set_input_shape(name, shape.of(name)))

    def _enqueue(self, context: Any, shape: StepShape) -> None:
        """Inputs to the GPU, the plan, logits back."""
        end = self._offsets[names.PAGE_TABLE] + 4 * shape.rows * shape.width
        self._stream.to_device(self._step_device.address, self._step_host.address, end)
        self._check(context.execute_async_v3(self._stream.handle))
        size = 4 * shape.rows * self._limits.vocabulary_size
        self._stream.to_host(self._logits_host.address, self._logits_device.address, size)

    def _check(self, succeeded: bool) -> None:
        if not succeeded:
            raise EngineError(f"TensorRT {self._trt.version}: {self._trt.logger.explain()}")


def table_width(longest: int, limits: SessionLimits) -> int:
    """Columns of the page table that a step gets: a power of two, so that few shapes occur, up to the whole width."""
    needed = max(1, -(-longest // limits.page_size))
    return int(min(limits.pages_per_sequence, 1 << (needed - 1).bit_length()))


def _step_layout(largest: StepShape) -> tuple[dict[str, int], int]:
    """Offset of each step input in the block that is copied to the GPU, and the block's size."""
    offsets, end = {}, 0
    for name in _STEP_ORDER:
        offsets[name] = end
        end += -(-4 * int(np.prod(largest.of(name))) // 256) * 256
    return offsets, end


def read_plan(engine: EngineDirectory, record: PlanRecord) -> bytes:
    """The plan's bytes.  Raises EngineError where they are missing or not what the build left."""
    path = engine.path / record.file
    if not path.is_file():
        raise EngineError(f"{path}: missing; run socket-trt compile {engine.path}")
    plan = path.read_bytes()
    if hashlib.sha256(plan).hexdigest() != record.sha256:
        raise EngineError(f"{path}: changed since it was built; run socket-trt compile {engine.path}")
    return plan


def check_compatible(engine: EngineDirectory, record: PlanRecord, tensorrt: TensorRT) -> None:
    """Raise EngineError where the plan was built for another TensorRT, GPU or plugin than are here."""
    gpu, plugin = tensorrt.gpu, tensorrt.plugin
    pairs = [
        (f"TensorRT {record.tensorrt}", f"TensorRT {tensorrt.version}"),
        (f"an {record.gpu} ({record.compute_capability})", f"an {gpu.name} ({gpu.compute_capability})"),
        (
            f"plugin {record.plugin_release} ({record.plugin_sha256[:12]})",
            f"plugin {plugin.release} ({plugin.sha256[:12]})",
        ),
    ]
    for built, here in pairs:
        if built != here:
            raise EngineError(
                f"{engine.path}: its plan was built for {built}, here is {here}; run socket-trt compile again"
            )
    if record.cublas is not None and plugin.cublas is None:
        raise EngineError(
            f"{engine.path}: cuBLAS {record.cublas} computed its plan's products; {NO_CUBLAS}, or run socket-trt compile "
            "again"
        )
