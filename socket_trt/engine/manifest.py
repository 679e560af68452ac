"""`build.json`, the manifest of an engine directory: everything that running and validating it need to know."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from socket_trt import __version__, names
from socket_trt.config import AttentionKind, SocketConfig
from socket_trt.errors import EngineError
from socket_trt.runtime.session import SessionLimits, full_pool
from socket_trt.weights import FileRecord, TensorLocation, check_files, sha256_of

# Raised with every change that an older or newer release could misread.
FORMAT = 4

MANIFEST_FILE = "build.json"
GRAPH_FILE = "model.onnx"
PLAN_FILE = "engine.plan"
EMBEDDED_WEIGHTS_FILE = "model.onnx.data"
CHECKPOINT_DIRECTORY = "checkpoint"  # of weights that the build made itself

BuildDType = Literal["float32", "float16", "bfloat16"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRecord(_Record):
    """The model.  `checkpoint` is the directory PyTorch can load it from (relative where the build made it)."""

    name: str
    checkpoint: str
    family: str
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    vocabulary_size: int
    stop_token_ids: list[int]
    random_weights: bool


class TensorRecord(_Record):
    name: str
    dtype: str
    shape: list[int | str]


class GraphRecord(_Record):
    file: str
    sha256: str
    opset: int
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]


class WeightsRecord(_Record):
    """Where the weights are.

    external: `tensors` maps initializers to bytes of `files`, which lie in `directory` (relative to the engine directory
    where the build made them).  embedded: in `files` beside the graph.  absent: `--graph-only` of random weights.
    """

    mode: Literal["external", "embedded", "absent"]
    directory: str
    files: dict[str, FileRecord]
    tensors: dict[str, TensorLocation]


class PlanRecord(_Record):
    """TensorRT's plan of the graph, and what it runs with: a plan fits one TensorRT, one GPU and one plugin.

    max_step_tokens     tokens a step may have;  max_pages  pages the pool of a session may have
    optimization_level  of TensorRT's builder
    cublas              version of the cuBLAS that computed products when it was built; None: TensorRT computes them
    """

    file: str
    sha256: str
    tensorrt: str
    gpu: str
    compute_capability: str
    plugin: str
    plugin_release: str
    plugin_sha256: str
    max_step_tokens: int
    max_pages: int
    optimization_level: int
    cublas: str | None
    build_seconds: float


class Manifest(_Record):
    format: int
    versions: dict[str, str]
    created: str
    backend: Literal["onnxruntime", "tensorrt"]
    attention: AttentionKind
    dtype: BuildDType
    max_batch_size: int
    max_seq_len: int
    model: ModelRecord
    socket: SocketConfig
    graph: GraphRecord
    weights: WeightsRecord
    plan: PlanRecord | None = None

    def limits(self, num_pages: int | None = None) -> SessionLimits:
        """What a session of this engine holds; by default a pool in which a full batch of full sequences fits."""
        return SessionLimits(
            vocabulary_size=self.model.vocabulary_size,
            page_size=self.socket.page_size,
            num_pages=num_pages or full_pool(self.max_batch_size, self.max_seq_len, self.socket.page_size),
            max_batch_size=self.max_batch_size,
            max_seq_len=self.max_seq_len,
        )

    def cache_shapes(self, num_pages: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's four caches, by kind (`names.CACHE_KINDS`)."""
        heads, size, socket = self.model.kv_heads, self.socket.page_size, self.socket
        shapes = (
            (num_pages, heads, size, self.model.head_size),
            (num_pages, heads, size, self.model.head_size),
            (num_pages, heads, socket.tables, socket.code_words),
            (num_pages, heads, size),
        )
        return dict(zip(names.CACHE_KINDS, shapes, strict=True))

    def cache_bytes_per_page(self) -> int:
        """Bytes that one page takes in all layers."""
        item = 4 if self.dtype == "float32" else 2
        heads, size, socket = self.model.kv_heads, self.socket.page_size, self.socket
        layer = heads * (size * (2 * self.model.head_size + 1) * item + socket.tables * socket.code_words * 4)
        return self.model.layers * layer


class EngineDirectory:
    """An engine directory that was read and found whole."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> EngineDirectory:
        """Read the manifest.  Raises EngineError where it is missing, damaged, or of another version."""
        file = path / MANIFEST_FILE
        if not path.is_dir():
            raise EngineError(
                f"{path}: no such engine directory; make one with `socket-trt build --model NAME -o {path}`"
            )
        if not file.is_file():
            raise EngineError(f"{path}: no engine directory: it has no {MANIFEST_FILE}")
        text = file.read_bytes()
        try:
            head = _Head.model_validate_json(text)
        except ValidationError:  # of what is no UTF-8 too
            raise EngineError(f"{file}: not a manifest of socket-trt, or damaged; build the engine again") from None
        if head.format != FORMAT:
            raise EngineError(
                f"{path}: built by socket-trt {head.versions.get('socket-trt', 'unknown')} in format {head.format}, this is "
                f"socket-trt {__version__} with format {FORMAT}; build the engine again"
            )
        try:
            return cls(path, Manifest.model_validate_json(text))
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise EngineError(f"{file}: damaged at '{where}'; build the engine again") from None

    @property
    def graph(self) -> Path:
        return self.path / self.manifest.graph.file

    @property
    def weights_directory(self) -> Path:
        return self.path / self.manifest.weights.directory

    @property
    def checkpoint_directory(self) -> Path:
        return self.path / self.manifest.model.checkpoint

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"

    def check_writable(self) -> None:
        """Raise EngineError where nothing can be written here: before minutes are spent on what could not be kept."""
        if not os.access(self.path, os.W_OK):
            raise EngineError(f"{self.path}: cannot be written; mount it writable, or work on a copy")

    def write(self, manifest: Manifest) -> None:
        """Replace the manifest, at once."""
        partial = self.path / f".{MANIFEST_FILE}.partial"
        try:
            partial.write_text(manifest.model_dump_json(indent=2) + "\n")
            partial.replace(self.path / MANIFEST_FILE)
        except OSError as error:
            raise EngineError(f"{self.path}: cannot be written ({error.strerror})") from None
        self.manifest = manifest

    def check_graph(self) -> None:
        """Raise EngineError unless the graph is what the build left."""
        record = self.manifest.graph
        if not self.graph.is_file():
            raise EngineError(f"{self.graph}: missing; build the engine again")
        if sha256_of(self.graph) != record.sha256:
            raise EngineError(f"{self.graph}: changed since it was built; build the engine again")

    def check(self) -> None:
        """Raise unless graph and weights are what the build left: EngineError, or CheckpointError for external weights."""
        self.check_graph()
        if self.manifest.weights.mode == "absent":
            raise EngineError(
                f"{self.path}: built with --graph-only, so it has no weights to run with; build again without"
            )
        check_files(self.weights_directory, self.manifest.weights.files)


class _Head(BaseModel):
    """The part of a manifest that every version has."""

    format: int
    versions: dict[str, str]
