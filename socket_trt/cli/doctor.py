"""`socket-trt doctor`."""

from __future__ import annotations

import dataclasses
import platform
from typing import Annotated

import typer

from socket_trt import __version__, environment
from socket_trt.cli.console import out, table


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Report what this machine has, and what each missing part would enable."""
    parts = environment.survey()
    if as_json:
        out.print_json(data={"socket-trt": __version__, "parts": [dataclasses.asdict(part) for part in parts]})
        return
    rows = [
        (part.name, part.found or "[yellow]missing[/]", ("" if part.found else "would enable ") + part.enables)
        for part in parts
    ]
    out.print(table(f"socket-trt {__version__}, Python {platform.python_version()}", ("part", "found", "for"), rows))
