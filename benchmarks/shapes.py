"""Engines of Llama-3-8B's shapes without its weights: what is timed and served where only shapes matter."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

from socket_trt.config import AttentionKind, SocketConfig
from socket_trt.engine.build import BuildOptions, build_engine
from socket_trt.models.checkpoint import resolve_model
from socket_trt.models.presets import find_preset
from socket_trt.progress import Progress

# 3 % kept, and sparse at every length, or a case at 18K tokens would time dense attention against itself.
_SOCKET = SocketConfig(budget_permille=30, min_length=0)
_LARGE = BuildOptions(
    _SOCKET, backend="tensorrt", dtype="float16", max_batch_size=4, max_seq_len=512 << 10, graph_only=True
)
_SERVING = dataclasses.replace(_LARGE, max_batch_size=16, max_seq_len=64 << 10)

# Layers, and what is built.  The one-layer case is the one that the method's authors published.
SHAPES: dict[str, tuple[int, BuildOptions]] = {
    "llama3-8b": (32, _LARGE),
    "llama3-8b-1layer": (
        1,
        dataclasses.replace(
            _LARGE,
            socket=_SOCKET.model_copy(update={"planes": 10, "temperature": 0.4}),
            max_batch_size=1,
            max_seq_len=144 << 10,
        ),
    ),
    "llama3-8b-serving": (32, _SERVING),
    "llama3-8b-serving-dense": (32, dataclasses.replace(_SERVING, attention=AttentionKind.dense)),
}


def export(name: str, directory: Path, progress: Progress, *, force: bool = False) -> None:
    """The graph of one of `SHAPES`, without a plan; needs PyTorch.  `force`: in place of an engine that is there."""
    layers, options = SHAPES[name]
    with tempfile.TemporaryDirectory() as scratch:
        # Longer contexts than the model was made for: its shapes are wanted, not its answers.
        changed = {"num_hidden_layers": layers, "max_position_embeddings": 1 << 20}
        (Path(scratch) / "config.json").write_text(json.dumps(find_preset("llama3-8b").config | changed))
        source = dataclasses.replace(resolve_model(scratch, random_weights=True), name=name)
        build_engine(source, directory, dataclasses.replace(options, force=force), progress)
