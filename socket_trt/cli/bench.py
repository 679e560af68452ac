"""`socket-trt bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from socket_trt.cases import parse_cases
from socket_trt.cli.console import RichProgress, out, table
from socket_trt.cli.extras import needs
from socket_trt.cli.outputs import check_outputs
from socket_trt.cli.sizes import human_bytes
from socket_trt.engine.manifest import EngineDirectory

if TYPE_CHECKING:
    from socket_trt.benchmark import BenchReport


def bench(
    directory: Annotated[Path, typer.Argument(help="Engine directory with a TensorRT plan.")],
    cases: Annotated[
        str, typer.Option(help="Decode steps to time: BATCHxTOKENS, separated by commas; K is 1024.")
    ] = "1x8K",
    steps: Annotated[int, typer.Option(min=1, help="Steps to time in each case.")] = 50,
    prefill: Annotated[int, typer.Option(min=0, help="Tokens of a prompt to time; 0: none.")] = 0,
    dense: Annotated[
        bool, typer.Option("--dense/--no-dense", help="Time the same graph with dense attention too.")
    ] = True,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random weights, drawn on the GPU: nothing is read from disk.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Time each layer of the plan in the first case.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of tokens, caches and random weights.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the report to this file, as JSON.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the decode times to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Time decode steps and prefill of a TensorRT engine, SOCKET against dense, on caches of random keys and values."""
    engine = EngineDirectory.open(directory)
    with needs("tensorrt", "benchmarking", others={"matplotlib": "plot"}):
        from socket_trt.benchmark import BenchOptions, plot, run_benchmark

        check_outputs(output, plot_file)
    options = BenchOptions(
        cases=parse_cases("--cases", cases),
        steps=steps,
        prefill=prefill,
        dense=dense,
        random_weights=random_weights,
        layers=layers,
        seed=seed,
    )
    report = run_benchmark(engine, options, RichProgress())
    if output is not None:
        output.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    if plot_file is not None:
        plot([report], plot_file)
    if as_json:
        out.print_json(data=report.as_dict())
        return
    print_report(report)


def print_report(report: BenchReport) -> None:
    rows = []
    for result in report.decode:
        speedup = report.speedup(result)
        rows.append(
            (
                str(result.batch),
                str(result.context),
                result.attention,
                f"{result.step_ms:.3f}",
                f"{result.gpu_ms:.3f}",
                f"{result.tokens_per_second:.1f}",
                "" if speedup is None else f"{speedup:.2f}x",
            )
        )
    columns = ("batch", "tokens", "attention", "ms a step", "on the GPU", "tokens/s", "against dense")
    versions = f"TensorRT {report.tensorrt}" + (f", cuBLAS {report.cublas}" if report.cublas else "")
    out.print(table(f"{report.model}: {report.gpu}, {versions}", columns, rows))
    for entry in report.prefill:
        out.print(f"prefill, {entry['attention']}: {entry['tokens']} tokens, {entry['tokens_per_second']:.0f} tokens/s")
    out.print("memory: " + ", ".join(f"{name} {human_bytes(size)}" for name, size in report.memory_bytes.items()))
