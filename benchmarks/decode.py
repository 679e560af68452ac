"""Decode speed of Llama-3-8B's shapes on TensorRT, SOCKET against dense attention: table, JSON and plot.

    python -m benchmarks.decode --output benchmarks/results

Random weights, random caches (`socket_trt.benchmark`), nothing downloaded: the graphs are exported once into --engines,
and their plans built for this GPU.  A machine without PyTorch takes engine directories exported elsewhere in the same
place; reports measured elsewhere (`socket-trt bench --output`) are put together with --reports.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.files import gpu_slug, write_results
from socket_trt.benchmark import BenchOptions, BenchReport, plot, run_benchmark
from socket_trt.cases import Case
from socket_trt.cli.console import RichProgress
from socket_trt.engine.compile import compile_engine
from socket_trt.engine.manifest import MANIFEST_FILE, EngineDirectory

# What is timed of the engines of `benchmarks.shapes`.
OPTIONS = {
    "llama3-8b": BenchOptions(
        [Case(1, 128 << 10), Case(4, 128 << 10), Case(1, 512 << 10)], prefill=8192, random_weights=True
    ),
    "llama3-8b-1layer": BenchOptions([Case(1, 18 << 10), Case(1, 140 << 10)], steps=200, random_weights=True),
}


def measure(name: str, directory: Path) -> BenchReport:
    if not (directory / MANIFEST_FILE).is_file():
        from benchmarks.shapes import export  # needs PyTorch

        export(name, directory, RichProgress())
    compile_engine(EngineDirectory.open(directory), RichProgress())
    return run_benchmark(EngineDirectory.open(directory), OPTIONS[name], RichProgress())


def table(reports: list[BenchReport]) -> str:
    """The reports in Markdown."""
    first = reports[0]
    lines = [
        f"# Decode steps on {first.gpu}, TensorRT {first.tensorrt}\n",
        "Written by `python -m benchmarks.decode`; random weights, caches of random keys and values.\n",
        "| model | batch | tokens | attention | ms a step | on the GPU | tokens/s | against dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        model = f"{report.model}, R = {report.parameters['planes']}"
        model += f", products by cuBLAS {report.cublas}" if report.cublas else ""
        for result in report.decode:
            speedup = report.speedup(result)
            lines.append(
                f"| {model} | {result.batch} | {result.context} | {result.attention} | {result.step_ms:.3f} | "
                f"{result.gpu_ms:.3f} | {result.tokens_per_second:.1f} | {f'{speedup:.2f}x' if speedup else ''} |"
            )
    lines += [
        f"\nPrefill, {report.model}, {entry['attention']}: {entry['tokens_per_second']:.0f} tokens/s"
        for report in reports
        for entry in report.prefill
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, default=Path("build/benchmark"), help="engine directories")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for table, JSON, plot")
    parser.add_argument("--reports", type=Path, nargs="*", help="put these reports together instead of measuring")
    arguments = parser.parse_args()
    if arguments.reports:
        reports = [BenchReport.from_dict(json.loads(path.read_text())) for path in arguments.reports]
    else:
        reports = [measure(name, arguments.engines / name) for name in OPTIONS]
    stem = arguments.output / f"decode-{gpu_slug(reports[0].gpu)}"
    write_results(stem, [report.as_dict() for report in reports], table(reports))
    plot(reports, stem.with_suffix(".png"))
    print(table(reports))


if __name__ == "__main__":
    main()
