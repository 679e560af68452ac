"""Where the command line writes: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from socket_trt.progress import Advance

# A table in a log or a pipe is read on something wider than rich's 80 columns.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class RichProgress:
    """`socket_trt.progress.Progress` as lines on stderr: a spinner, a bar where the total is known, the time taken."""

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        columns = [SpinnerColumn(finished_text="[green]done[/]"), TextColumn("{task.description}"), TimeElapsedColumn()]
        if total is not None:
            columns[2:2] = [BarColumn(), TaskProgressColumn()]
        with Progress(*columns, console=err) as progress:
            number = progress.add_task(description, total=total)
            yield lambda amount: progress.advance(number, amount)
            progress.update(number, total=total or 1, completed=total or 1)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table for stdout."""
    grid = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, show_header=any(columns))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid
