"""`socket-trt validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from socket_trt.cli.console import RichProgress, out, table
from socket_trt.cli.extras import needs
from socket_trt.engine.manifest import EngineDirectory

if TYPE_CHECKING:
    from socket_trt.validation.report import ValidationReport

_COLOURS = {"passed": "[green]passed[/]", "failed": "[bold red]FAILED[/]", "skipped": "[yellow]skipped[/]"}


def validate(
    directory: Annotated[Path, typer.Argument(help="Engine directory.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random tokens that are fed.")] = 0,
    record: Annotated[
        bool,
        typer.Option(
            "--record", help="Only write what PyTorch expects to DIR/reference.npz, for a machine without it."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare an engine directory with its PyTorch model, write validation.json, exit with 1 where a gate fails."""
    engine = EngineDirectory.open(directory)
    with needs("validate", "validation"):
        from socket_trt.validation.validate import record_answers, validate_engine
    if record:
        out.print(f"wrote {record_answers(engine, RichProgress(), seed)}")
        return
    report = validate_engine(engine, RichProgress(), seed)
    if as_json:
        out.print_json(report.model_dump_json())
    else:
        _print(report, directory)
    raise typer.Exit(0 if report.passed else 1)


def _print(report: ValidationReport, directory: Path) -> None:
    rows = [(g.gate.value, _COLOURS[g.outcome], g.measured, g.bound, g.detail) for g in report.gates]
    title = f"{directory}: {report.model} ({report.family}), {report.dtype}, {report.attention}"
    out.print(table(title, ("gate", "", "measured", "bound", "what"), rows))
