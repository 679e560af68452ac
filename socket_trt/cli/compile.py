"""`socket-trt compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from socket_trt.cli.build import plan_text
from socket_trt.cli.console import RichProgress, out, table
from socket_trt.cli.extras import needs
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.engine.profiles import DEFAULT_MAX_STEP_TOKENS


def compile_(
    directory: Annotated[Path, typer.Argument(help="Engine directory, built with --backend tensorrt.")],
    max_step_tokens: Annotated[
        int, typer.Option(help="Tokens a step may have at most: the size of a prefill chunk.")
    ] = DEFAULT_MAX_STEP_TOKENS,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            min=0, max=5, help="How long TensorRT searches for fast kernels; by default what suits its version."
        ),
    ] = None,
    cublas: Annotated[
        bool | None,
        typer.Option(
            "--cublas/--no-cublas",
            help="Whether cuBLAS and plugins compute products, norms, rotary embeddings and gates on TensorRT 8.6; "
            "by default where cuBLAS is installed.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Build TensorRT's plan of an engine directory for the GPU of this machine; needs no PyTorch."""
    engine = EngineDirectory.open(directory)
    with needs("tensorrt", "compiling"):
        from socket_trt.engine.compile import compile_engine
    manifest = compile_engine(engine, RichProgress(), max_step_tokens, optimization_level, cublas)
    if as_json:
        out.print_json(manifest.model_dump_json())
    else:
        out.print(table(f"Compiled {directory}", ("", ""), [("plan", plan_text(manifest))]))
