"""`socket-trt`: one module a command; this one gathers them and turns errors into one line and an exit status.

Exit status: 0 done, 1 a validation failed, 2 an error that the user can mend.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Literal

import typer
from rich.markup import escape

from socket_trt import __version__
from socket_trt.cli import bench, build, compile, deploy, doctor, eval, generate, inspect, tune, validate
from socket_trt.cli.console import err, out
from socket_trt.errors import SocketTrtError

app = typer.Typer(
    name="socket-trt",
    help="SOCKET sparse attention for TensorRT engines: build, validate and run long-context models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("build")(build.build)
app.command("compile")(compile.compile_)
app.command("inspect")(inspect.inspect)
app.command("validate")(validate.validate)
app.command("generate")(generate.generate)
app.command("eval")(eval.eval_)
app.command("tune")(tune.tune)
app.command("bench")(bench.bench)
app.command("deploy")(deploy.deploy)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"socket-trt {__version__}")
        raise typer.Exit


# TensorRT's own INFO messages come at debug, its VERBOSE ones, hundreds of thousands in a build, at trace.
_LEVELS = {"warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG, "trace": 1}


_LOGGER = logging.getLogger("socket_trt")


def _log(level: str) -> None:
    """Messages of this package, and what TensorRT tells it, to stderr, each with its time."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    _LOGGER.handlers = [handler]
    _LOGGER.setLevel(_LEVELS[level])


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    log: Annotated[
        Literal["warning", "info", "debug", "trace"],
        typer.Option(help="What to log to stderr; debug shows TensorRT's messages, trace its verbose ones."),
    ] = "warning",
) -> None:
    """Options that belong to no command."""
    _log(log)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `arguments` are the process's by default.  Always ends in SystemExit."""
    handlers, level = _LOGGER.handlers, _LOGGER.level
    try:
        app(args=arguments)
    except SocketTrtError as error:
        err.print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}")
        sys.exit(2)
    finally:  # whoever called this from Python has logging as it was
        _LOGGER.handlers = handlers
        _LOGGER.setLevel(level)


if __name__ == "__main__":
    main()
