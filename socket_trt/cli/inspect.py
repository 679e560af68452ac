"""`socket-trt inspect`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from socket_trt.cli.build import plan_text
from socket_trt.cli.console import out, table
from socket_trt.cli.sizes import human_bytes
from socket_trt.engine.manifest import EngineDirectory, Manifest
from socket_trt.errors import MissingDependencyError, SocketTrtError
from socket_trt.validation.report import VALIDATION_FILE


def inspect(
    directory: Annotated[Path, typer.Argument(help="Engine directory.")],
    commands: Annotated[
        bool, typer.Option("--commands", help="Only print command lines of trtexec and polygraphy for the same plan.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what an engine directory holds, whether it is whole, and what memory it takes."""
    engine = EngineDirectory.open(directory)
    manifest = engine.manifest
    if commands:
        _print_commands(engine, as_json)
        return
    try:
        engine.check()
        state = "whole"
    except SocketTrtError as error:
        state = str(error)
    memory = _memory(manifest)
    validation = _validation(engine)
    if as_json:
        fields = {
            "manifest": manifest.model_dump(mode="json"),
            "memory": memory,
            "state": state,
            "validation": validation,
        }
        out.print_json(data=fields)
        return
    out.print(table(str(directory), ("", ""), _rows(manifest, memory, state, validation)))


def _print_commands(engine: EngineDirectory, as_json: bool) -> None:
    try:
        from socket_trt.engine.commands import build_commands
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"this needs the package '{error.name}': pip install 'socket-trt[tensorrt]'"
        ) from None
    lines = build_commands(engine)
    if as_json:
        out.print_json(data=lines)
    else:
        sys.stdout.write("\n\n".join(lines.values()) + "\n")


def _memory(manifest: Manifest) -> dict[str, int]:
    """Bytes: weights as the engine computes with them, one page of the cache, and how many tokens a GiB caches."""
    item = 4 if manifest.dtype == "float32" else 2
    tensors = manifest.weights.tensors.values()
    if tensors:
        unique = {(t.file, t.offset): t.shape for t in tensors}
        weights = sum(math.prod(shape) for shape in unique.values()) * item
    else:
        weights = sum(record.size for record in manifest.weights.files.values())
    page = manifest.cache_bytes_per_page()
    return {
        "weights_bytes": weights,
        "page_bytes": page,
        "cached_tokens_per_gib": (1 << 30) // page * manifest.socket.page_size,
    }


def _validation(engine: EngineDirectory) -> str:
    """The last validation's outcome, as far as it speaks of this graph."""
    file = engine.path / VALIDATION_FILE
    if not file.is_file():
        return f"none; run socket-trt validate {engine.path}"
    report: dict[str, Any] = json.loads(file.read_text())
    if report.get("engine_graph_sha256") != engine.manifest.graph.sha256:
        return "of another graph; validate again"
    failed = [gate["gate"] for gate in report["gates"] if gate["outcome"] == "failed"]
    return f"failed: {', '.join(failed)}" if failed else "passed"


def _rows(manifest: Manifest, memory: dict[str, int], state: str, validation: str) -> list[tuple[str, str]]:
    model, socket = manifest.model, manifest.socket
    return [
        ("model", f"{model.name} ({model.family}){', random weights' if model.random_weights else ''}"),
        (
            "shape",
            f"{model.layers} layers, {model.query_heads} query heads, {model.kv_heads} KV heads of {model.head_size}",
        ),
        ("attention", manifest.attention.value),
        ("codes", f"{socket.tables} tables of {socket.planes} planes, temperature {socket.temperature}"),
        (
            "attended",
            f"sink {socket.sink}, window {socket.window}, and the best max({socket.budget_tokens}, "
            f"{socket.budget_permille / 10:g} % of the length) by {socket.selection.name}",
        ),
        ("runs on", f"{manifest.backend}, {manifest.dtype}, opset {manifest.graph.opset}"),
        (
            "limits",
            f"{manifest.max_batch_size} sequences of {manifest.max_seq_len} tokens, pages of {socket.page_size}",
        ),
        ("weights", f"{manifest.weights.mode}, {human_bytes(memory['weights_bytes'])} in {manifest.dtype}"),
        (
            "cache",
            f"{human_bytes(memory['page_bytes'])} a page, {memory['cached_tokens_per_gib']} tokens a GiB",
        ),
        *([("plan", plan_text(manifest))] if manifest.backend == "tensorrt" else []),
        ("built", f"{manifest.created} by socket-trt {manifest.versions['socket-trt']}"),
        ("state", state),
        ("validation", validation),
    ]
