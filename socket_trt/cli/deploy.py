"""`socket-trt deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from socket_trt.cli.console import out, table
from socket_trt.cli.extras import needs
from socket_trt.config import parse_numbers
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.runtime.open import runs_on_gpu


def deploy(
    directory: Annotated[Path, typer.Argument(help="Engine directory.")],
    repository: Annotated[Path, typer.Option("--model-repository", help="Triton's model repository.")],
    name: Annotated[
        str | None, typer.Option(help="Name that clients ask for; the engine directory's by default.")
    ] = None,
    engine_path: Annotated[
        Path | None, typer.Option(help="Where the server sees the engine directory, if elsewhere than this machine.")
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="GPUs that serve, such as 0,1,2,3; GPU 0 by default for an engine that needs one."),
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Copies of the engine on each GPU, or on the CPU.")] = 1,
    num_pages: Annotated[
        int | None, typer.Option(min=2, help="Pages of the cache; by default a full batch of full sequences fits.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused.")] = 1000,
    max_step_tokens: Annotated[
        int | None, typer.Option(min=3, help="Tokens a step may have; by default as many as the engine is made for.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Seconds that a request may take, whatever it asks for; any time by default.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Serve without the checkpoint, for speed alone (TensorRT).")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing entry.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write the entry of a Triton model repository that serves an engine directory."""
    engine = EngineDirectory.open(directory)
    with needs("serving", "deploying"):
        from socket_trt.serving.deploy import Deployment, deploy_engine
        from socket_trt.serving.parameters import ModelParameters
    parameters = ModelParameters.create(
        engine=str(engine_path or directory.resolve()),
        num_pages=num_pages,
        max_waiting=max_waiting,
        max_step_tokens=max_step_tokens,
        max_seconds=max_seconds,
        random_weights=random_weights,
    )
    chosen = tuple(parse_numbers("--gpus", gpus)) if gpus is not None else (0,) if runs_on_gpu(engine) else ()
    deployment = Deployment(name or directory.resolve().name, parameters, chosen, instances)
    entry = deploy_engine(engine, repository, deployment, force)
    if as_json:
        out.print_json(data={"entry": str(entry), "gpus": chosen, "instances": instances, **parameters.model_dump()})
        return
    rows = [
        ("model", deployment.name),
        ("engine", parameters.engine),
        *([] if engine.tokenizer_file.is_file() else [("tokenizer", "none: the model takes and gives token ids only")]),
        ("serves on", f"GPU {', '.join(map(str, chosen))}" if chosen else "CPU"),
        ("next", f"tritonserver --model-repository {repository}"),
    ]
    out.print(table(f"Wrote {entry}", ("", ""), rows))
