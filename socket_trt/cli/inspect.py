"""`socket-trt inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from socket_trt.cli.build import dense_up_to, plan_text
from socket_trt.cli.console import out, table
from socket_trt.cli.extras import needs
from socket_trt.cli.sizes import human_bytes
from socket_trt.config import parse_numbers
from socket_trt.engine.manifest import EngineDirectory, Manifest
from socket_trt.engine.memory import GIB, Capacity, Memory, capacity, memory_of
from socket_trt.errors import ConfigError, EngineError, SocketTrtError
from socket_trt.validation.report import ValidationReport


def inspect(
    directory: Annotated[Path, typer.Argument(help="Engine directory.")],
    memory: Annotated[
        float,
        typer.Option(
            min=0.001, help="GiB of GPU memory, all or what may be used of it: how many pages and tokens they hold."
        ),
    ] = 80.0,
    batch: Annotated[
        str, typer.Option(help="For so many sequences together, such as 1,8,64: how many tokens each may have.")
    ] = "1,8,64",
    commands: Annotated[
        bool, typer.Option("--commands", help="Only print command lines of trtexec and polygraphy for the same plan.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what an engine directory holds, whether it is whole, what memory it takes, and what fits beside it."""
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
    own = memory_of(manifest)
    batches = parse_numbers("--batch", batch)
    if 0 in batches:
        raise ConfigError(f"--batch {batch}: at least one sequence runs")
    fits = capacity(manifest, int(memory * GIB), batches)
    validation = _validation(engine)
    if as_json:
        fields = {
            "manifest": manifest.model_dump(mode="json"),
            "memory": own.model_dump(),
            "capacity": fits.model_dump(),
            "state": state,
            "validation": validation,
        }
        out.print_json(data=fields)
        return
    out.print(table(str(directory), ("", ""), [*_rows(manifest, own, state, validation), *_capacity_rows(fits)]))


def _print_commands(engine: EngineDirectory, as_json: bool) -> None:
    with needs("tensorrt", "--commands"):
        from socket_trt.engine.commands import build_commands
    lines = build_commands(engine)
    if as_json:
        out.print_json(data=lines)
    else:
        sys.stdout.write("\n\n".join(lines.values()) + "\n")


def _validation(engine: EngineDirectory) -> str:
    """The last validation's outcome, as far as it speaks of this graph."""
    try:
        report = ValidationReport.last(engine.path)
    except EngineError as error:
        return str(error)
    if report is None:
        return f"none; run socket-trt validate {engine.path}"
    if report.engine_graph_sha256 != engine.manifest.graph.sha256:
        return "of another graph; validate again"
    failed = [gate.gate.value for gate in report.gates if gate.outcome == "failed"]
    return f"failed: {', '.join(failed)}" if failed else "passed"


def _rows(manifest: Manifest, memory: Memory, state: str, validation: str) -> list[tuple[str, str]]:
    model, socket = manifest.model, manifest.socket
    return [
        ("model", f"{model.name} ({model.family}){', random weights' if model.random_weights else ''}"),
        (
            "shape",
            f"{model.layers} layers, {model.query_heads} query heads, {model.kv_heads} KV heads of {model.head_size}",
        ),
        ("attention", f"{manifest.attention.value}{dense_up_to(manifest)}"),
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
        ("weights", f"{manifest.weights.mode}, {human_bytes(memory.weights_bytes)} in {manifest.dtype}"),
        (
            "cache",
            f"{human_bytes(memory.page_bytes)} a page, {memory.code_bytes / memory.page_bytes:.1%} of it codes and norms; "
            f"{memory.pages_per_gib} pages or {memory.cached_tokens_per_gib} tokens a GiB",
        ),
        *([("plan", plan_text(manifest))] if manifest.backend == "tensorrt" else []),
        ("built", f"{manifest.created} by socket-trt {manifest.versions['socket-trt']}"),
        ("state", state),
        ("validation", validation),
    ]


def _capacity_rows(fits: Capacity) -> list[tuple[str, str]]:
    title = f"{human_bytes(fits.memory_bytes)} hold"
    if not fits.cached_tokens:
        return [(title, "not even the weights and one page")]
    each = ", ".join(f"{tokens} of {batch}" for batch, tokens in fits.tokens_by_batch.items())
    return [
        (
            title,
            f"with {human_bytes(fits.reserved_bytes)} reserved: {fits.num_pages} pages (deploy --num-pages), "
            f"{fits.cached_tokens} tokens in all, {fits.full_sequences} sequences of the limit",
        ),
        ("", f"tokens a sequence: {each} together"),
    ]
