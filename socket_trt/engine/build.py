"""Build an engine directory: resolve weights, export the graph, attach the weights, write the manifest.

Everything is written to a directory beside the output and renamed at the end, so that a build that fails leaves nothing
behind and destroys nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir
import torch

from socket_trt import __version__
from socket_trt.config import AttentionKind, SocketConfig
from socket_trt.engine.compile import compile_engine
from socket_trt.engine.manifest import (
    CHECKPOINT_DIRECTORY,
    EMBEDDED_WEIGHTS_FILE,
    FORMAT,
    GRAPH_FILE,
    MANIFEST_FILE,
    BuildDType,
    EngineDirectory,
    GraphRecord,
    Manifest,
    ModelRecord,
    TensorRecord,
    WeightsRecord,
)
from socket_trt.engine.profiles import DEFAULT_MAX_STEP_TOKENS, check_max_step_tokens
from socket_trt.errors import CheckpointError, ConfigError, EngineError
from socket_trt.models.checkpoint import COMPANIONS, ModelSource, stop_token_ids
from socket_trt.models.families import head_size
from socket_trt.models.random_checkpoint import plan_checkpoint, random_tensor, write_checkpoint
from socket_trt.models.tiny import write_tokenizer
from socket_trt.onnx.export import EXPORT_OPSET, export_model, parameter_shapes, save_graph
from socket_trt.onnx.function import MAX_OPSET, MIN_OPSET
from socket_trt.onnx.weights import attach_weights
from socket_trt.progress import Progress
from socket_trt.staging import check_replaceable, staged
from socket_trt.weights import FileRecord, TensorLocation, index_checkpoint, record_file, sha256_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_VERSIONED = ("onnx", "onnxruntime", "onnxscript", "torch", "transformers")
_KIND_NOT = "no engine directory"
# Random norms lie around what leaves activations alone; Gemma's norms multiply by one plus their weight.
_NORM_MEAN = {"gemma2": 0.0}


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What `socket-trt build` was asked for.

    max_seq_len  None: the model's own maximum
    graph_only   draw no random weights; a checkpoint's stay where they are
    with_plan    build TensorRT's plan here and now; `max_step_tokens` are what a step of it may have
    """

    socket: SocketConfig
    attention: AttentionKind = AttentionKind.socket
    backend: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    dtype: BuildDType = "float32"
    weights: Literal["external", "embedded"] = "external"
    max_batch_size: int = 8
    max_seq_len: int | None = None
    opset: int = EXPORT_OPSET
    graph_only: bool = False
    with_plan: bool = False
    max_step_tokens: int = DEFAULT_MAX_STEP_TOKENS
    force: bool = False
    seed: int = 0


def build_engine(source: ModelSource, output: Path, options: BuildOptions, progress: Progress) -> Manifest:
    """Write the engine directory `output` for `source`.

    Raises ConfigError for options that contradict each other, EngineError where the output cannot be written,
    CheckpointError where the weights are not what the model needs.
    """
    check_request(output, options)
    max_seq_len = _sequence_limit(source, options)
    checkpoint_index = index_checkpoint(source.checkpoint) if source.checkpoint is not None else None
    dtype = TORCH_DTYPES[options.dtype]
    socket = options.socket if options.attention is AttentionKind.socket else options.socket.attends_densely()
    with staged(output, options.force, _is_engine, _KIND_NOT, EngineError) as stage:
        with progress.task("Exporting the graph"):
            model = export_model(source.config, socket, dtype, max_seq_len, options.opset)
        if checkpoint_index is None:
            drawn = plan_checkpoint(parameter_shapes(source.config), dtype)
        used = attach_weights(model, checkpoint_index or drawn, source.config.tie_word_embeddings)

        made = stage / CHECKPOINT_DIRECTORY
        if source.checkpoint is None:
            made.mkdir()
            _write_companions(source, made)
            if not options.graph_only:
                _write_random_weights(source.config, drawn, made, options.seed, progress)
        _copy_companions(source.checkpoint or made, stage)

        weights = _place_weights(model, used, source.checkpoint, stage, options, progress)
        save_graph(model, stage / GRAPH_FILE, EMBEDDED_WEIGHTS_FILE if weights.mode == "embedded" else None)
        manifest = _manifest(source, stage, model, weights, socket, options, max_seq_len)
        (stage / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")
        if options.with_plan:
            manifest = compile_engine(EngineDirectory(stage, manifest), progress, options.max_step_tokens)
    return manifest


def check_request(output: Path, options: BuildOptions) -> None:
    """What can be found wrong before the model is looked at, which may be a download of hours.

    Raises ConfigError for options that contradict each other, EngineError where `output` may not be replaced.
    """
    check_replaceable(output, options.force, _is_engine, _KIND_NOT, EngineError)
    if options.backend == "onnxruntime" and options.dtype == "bfloat16" and not options.graph_only:
        raise ConfigError("ONNX Runtime on CPU has no bfloat16: give --dtype float32 or float16, or --graph-only")
    if options.graph_only and options.weights == "embedded":
        raise ConfigError("--graph-only writes no weights, --weights embedded does: leave one of them out")
    if options.max_batch_size < 1:
        raise ConfigError(f"--max-batch-size {options.max_batch_size}: at least one sequence")
    if not MIN_OPSET <= options.opset <= MAX_OPSET:
        raise ConfigError(f"--opset {options.opset}: opsets {MIN_OPSET} to {MAX_OPSET} are supported")
    if options.backend == "tensorrt":
        if options.dtype == "float32":
            raise ConfigError("TensorRT engines compute in float16 or bfloat16: give --dtype float16")
        check_max_step_tokens(options.max_step_tokens, options.max_batch_size)


def _sequence_limit(source: ModelSource, options: BuildOptions) -> int:
    """Tokens of a sequence at most.  Raises ConfigError where the model takes fewer than were asked for."""
    most = int(source.config.max_position_embeddings)
    if options.max_seq_len is None:
        return most
    if not 1 <= options.max_seq_len <= most:
        raise ConfigError(f"--max-seq-len {options.max_seq_len}: {source.name} takes 1 to {most} tokens")
    return options.max_seq_len


def _is_engine(directory: Path) -> bool:
    return (directory / MANIFEST_FILE).is_file()


def _write_companions(source: ModelSource, directory: Path) -> None:
    """Configuration and, for `tiny`, tokenizer of a checkpoint that the build makes itself."""
    source.config.save_pretrained(directory)
    if source.is_tiny:
        write_tokenizer(directory)


def _write_random_weights(
    config: PretrainedConfig, plan: dict[str, TensorLocation], directory: Path, seed: int, progress: Progress
) -> None:
    std, norm_mean = float(config.initializer_range), _NORM_MEAN.get(config.model_type, 1.0)
    total = sum(location.length for location in plan.values())
    with progress.task("Drawing random weights", total) as advance:
        write_checkpoint(directory, plan, lambda name, shape: random_tensor(name, shape, std, norm_mean, seed), advance)


def _copy_companions(origin: Path, stage: Path) -> None:
    for name in COMPANIONS:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, stage / name)
    if (origin / "config.json").is_file() and not (stage / "tokenizer.json").exists():
        _convert_tokenizer(origin, stage)


def _convert_tokenizer(origin: Path, stage: Path) -> None:
    """tokenizer.json from an older tokenizer format, where the checkpoint has one that transformers can convert."""
    if not any((origin / name).is_file() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")):
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(origin))
        tokenizer.backend_tokenizer.save(str(stage / "tokenizer.json"))
    except Exception as error:
        reason = str(error).splitlines()[0][:160]
        raise CheckpointError(f"{origin}: its tokenizer cannot be converted to tokenizer.json ({reason})") from None


def _place_weights(
    model: ir.Model,
    used: dict[str, TensorLocation],
    checkpoint: Path | None,
    stage: Path,
    options: BuildOptions,
    progress: Progress,
) -> WeightsRecord:
    """Where the engine will read its weights, their files recorded with size and hash."""
    origin = checkpoint.resolve() if checkpoint is not None else stage / CHECKPOINT_DIRECTORY
    if checkpoint is None and options.graph_only:
        return WeightsRecord(mode="absent", directory=CHECKPOINT_DIRECTORY, files={}, tensors=used)
    if options.weights == "embedded":
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.base_dir = str(origin)
        return WeightsRecord(mode="embedded", directory=".", files={}, tensors={})
    files = _record_files(origin, sorted({location.file for location in used.values()}), progress)
    directory = CHECKPOINT_DIRECTORY if checkpoint is None else str(origin)
    return WeightsRecord(mode="external", directory=directory, files=files, tensors=used)


def _record_files(directory: Path, files: list[str], progress: Progress) -> dict[str, FileRecord]:
    total = sum((directory / name).stat().st_size for name in files)
    with progress.task("Hashing the weights", total) as advance:
        return {name: record_file(directory / name, advance) for name in files}


def _manifest(
    source: ModelSource,
    stage: Path,
    model: ir.Model,
    weights: WeightsRecord,
    socket: SocketConfig,
    options: BuildOptions,
    max_seq_len: int,
) -> Manifest:
    config = source.config
    if weights.mode == "embedded":
        weights = weights.model_copy(
            update={"files": {EMBEDDED_WEIGHTS_FILE: record_file(stage / EMBEDDED_WEIGHTS_FILE)}}
        )
    return Manifest(
        format=FORMAT,
        versions={
            "socket-trt": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _VERSIONED},
        },
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        backend=options.backend,
        attention=options.attention,
        dtype=options.dtype,
        max_batch_size=options.max_batch_size,
        max_seq_len=max_seq_len,
        model=ModelRecord(
            name=source.name,
            checkpoint=CHECKPOINT_DIRECTORY if source.checkpoint is None else str(source.checkpoint.resolve()),
            family=source.family,
            layers=config.num_hidden_layers,
            query_heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=head_size(config),
            vocabulary_size=config.vocab_size,
            stop_token_ids=stop_token_ids(config, source.checkpoint),
            random_weights=source.checkpoint is None,
        ),
        socket=socket,
        graph=GraphRecord(
            file=GRAPH_FILE,
            sha256=sha256_of(stage / GRAPH_FILE),
            opset=options.opset,
            inputs=[_tensor_record(value) for value in model.graph.inputs],
            outputs=[_tensor_record(value) for value in model.graph.outputs],
        ),
        weights=weights,
    )


def _tensor_record(value: ir.Value) -> TensorRecord:
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return TensorRecord(name=value.name, dtype=value.dtype.name.lower(), shape=shape)
