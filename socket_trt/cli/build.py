"""`socket-trt build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from socket_trt.cli.console import RichProgress, out, table
from socket_trt.cli.extras import needs
from socket_trt.cli.sizes import human_bytes
from socket_trt.config import AttentionKind, SocketConfig, parse_budget
from socket_trt.engine.manifest import BuildDType, Manifest
from socket_trt.engine.profiles import DEFAULT_MAX_STEP_TOKENS

_DEFAULT = SocketConfig()


def build(
    model: Annotated[str, typer.Option("-m", "--model", help="Preset, hub id (owner/name) or checkpoint directory.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Engine directory to write.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Directory with the model's weights, instead of a download.")
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Draw the weights at random: the model's shapes without a download."),
    ] = False,
    dtype: Annotated[
        Literal["auto", BuildDType],
        typer.Option(help="Type of weights, caches and activations; auto: float32 for ONNX Runtime, else float16."),
    ] = "auto",
    backend: Annotated[
        Literal["auto", "onnxruntime", "tensorrt"],
        typer.Option(help="What will run the engine; auto: TensorRT where this machine has all it needs."),
    ] = "auto",
    attention: Annotated[
        AttentionKind,
        typer.Option(help="socket: sparse; dense: the same graph attending to everything, as a baseline."),
    ] = AttentionKind.socket,
    tables: Annotated[int, typer.Option(help="L, the number of hash tables.")] = _DEFAULT.tables,
    planes: Annotated[int, typer.Option(help="R, hyperplanes in each table: bits of a code.")] = _DEFAULT.planes,
    temperature: Annotated[
        float, typer.Option(help="tau; the lower, the more the likeliest buckets count.")
    ] = _DEFAULT.temperature,
    sink: Annotated[int, typer.Option(help="First tokens, always attended.")] = _DEFAULT.sink,
    window: Annotated[int, typer.Option(help="Last tokens, always attended.")] = _DEFAULT.window,
    budget: Annotated[
        str,
        typer.Option(
            help="Tokens chosen by score for each query, besides sink and window: a fraction of the length in steps of 0.001, a number, or both (the larger counts)."
        ),
    ] = f"{_DEFAULT.budget_permille / 1000},{_DEFAULT.budget_tokens}",
    min_length: Annotated[
        int, typer.Option(help="Sequences no longer than this are attended densely.")
    ] = _DEFAULT.min_length,
    selection: Annotated[
        Literal["query_head", "kv_head"],
        typer.Option(help="Each query head chooses for itself, or a KV head's query heads together."),
    ] = "query_head",
    page_size: Annotated[int, typer.Option(help="Tokens a page of the cache.")] = _DEFAULT.page_size,
    weights: Annotated[
        Literal["external", "embedded"],
        typer.Option(help="external: stay in the checkpoint's files; embedded: copied beside the graph."),
    ] = "external",
    max_batch_size: Annotated[int, typer.Option(help="Sequences that decode together at most.")] = 8,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a sequence at most; the model's own limit by default.")
    ] = None,
    max_step_tokens: Annotated[
        int, typer.Option(help="Tokens a step may have at most (TensorRT): the size of a prefill chunk.")
    ] = DEFAULT_MAX_STEP_TOKENS,
    plan: Annotated[
        bool,
        typer.Option("--plan/--no-plan", help="Build TensorRT's plan now, or leave it to `socket-trt compile`."),
    ] = True,
    opset: Annotated[int, typer.Option(help="ONNX opset of the graph, 17 to 23.")] = 18,
    seed: Annotated[int, typer.Option(help="Seed of the hyperplanes and of random weights.")] = _DEFAULT.seed,
    graph_only: Annotated[
        bool, typer.Option("--graph-only", help="Draw no random weights: a graph to look at, or to time on TensorRT.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing engine directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Build an engine directory from a Hugging Face model."""
    socket = SocketConfig.create(
        tables=tables,
        planes=planes,
        temperature=temperature,
        sink=sink,
        window=window,
        **parse_budget(budget),
        min_length=min_length,
        selection=selection,
        page_size=page_size,
        seed=seed,
    )
    with needs("export", "building"):
        from socket_trt.engine.build import BuildOptions, build_engine, check_request
        from socket_trt.engine.tensorrt import choose_backend
        from socket_trt.models.checkpoint import resolve_model
    chosen = choose_backend(backend, with_plan=plan)
    automatic: BuildDType = "float32" if chosen == "onnxruntime" else "float16"
    options = BuildOptions(
        socket=socket,
        attention=attention,
        backend=chosen,
        dtype=automatic if dtype == "auto" else dtype,
        weights=weights,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        opset=opset,
        graph_only=graph_only,
        with_plan=plan and chosen == "tensorrt",
        max_step_tokens=max_step_tokens,
        force=force,
        seed=seed,
    )
    check_request(output, options)
    progress = RichProgress()
    with progress.task("Resolving the model"):
        source = resolve_model(model, checkpoint, random_weights)
    manifest = build_engine(source, output, options, progress)
    if as_json:
        out.print_json(manifest.model_dump_json())
    else:
        out.print(_summary(manifest, output))


def _summary(manifest: Manifest, output: Path) -> object:
    graph = output / manifest.graph.file
    plan = manifest.plan
    weights = sum(record.size for record in manifest.weights.files.values())
    has_weights = manifest.weights.mode != "absent"
    following = f"socket-trt validate {output}" if has_weights else "the same without --graph-only, to run it"
    if manifest.backend == "tensorrt" and plan is None:
        following = f"socket-trt compile {output}, on the machine that will run it"
    planned = [("plan", plan_text(manifest))] if manifest.backend == "tensorrt" else []
    return table(
        f"Built {output}",
        ("", ""),
        [
            ("model", f"{manifest.model.name} ({manifest.model.family}, {manifest.model.layers} layers)"),
            (
                "attention",
                f"{manifest.attention.value}, {manifest.model.layers} SocketAttention nodes{dense_up_to(manifest)}",
            ),
            ("graph", f"{graph.name}, {human_bytes(graph.stat().st_size)}, opset {manifest.graph.opset}"),
            ("weights", f"{manifest.weights.mode}, {human_bytes(weights)}"),
            ("runs on", f"{manifest.backend}, {manifest.dtype}"),
            *planned,
            ("next", following),
        ],
    )


def dense_up_to(manifest: Manifest) -> str:
    """Up to which length an engine of sparse attention attends densely, to be read behind its kind of attention."""
    length = manifest.socket.min_length
    if manifest.attention is AttentionKind.dense or length == 0:
        return ""
    if length < manifest.max_seq_len:
        return f", dense up to {length} tokens"
    return f", always dense: no sequence here is longer than --min-length {length}"


def plan_text(manifest: Manifest) -> str:
    """What an engine's plan was built with, in a line."""
    plan = manifest.plan
    if plan is None:
        return "none yet"
    products = f"products by cuBLAS {plan.cublas}, " if plan.cublas else ""
    return (
        f"TensorRT {plan.tensorrt}, {plan.gpu} ({plan.compute_capability}), plugin {plan.plugin_release} "
        f"({plan.plugin_sha256[:12]}), {products}steps of {plan.max_step_tokens} tokens, {plan.build_seconds:.1f} s"
    )
