"""`socket-trt tune`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from socket_trt.cases import Case, parse_cases
from socket_trt.cli.console import RichProgress, err, out, table
from socket_trt.cli.extras import needs
from socket_trt.cli.outputs import check_outputs
from socket_trt.config import SocketConfig
from socket_trt.cost import DEFAULT, Shape, load_cost_model
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import ConfigError
from socket_trt.quality.calibration import PROMPTS, Group, read_prompts, task_groups, trained_on_tasks
from socket_trt.quality.evaluate import parse_suite
from socket_trt.quality.vocabulary import Vocabulary

if TYPE_CHECKING:
    from socket_trt.quality.tuner import Tuning

AUTO = "auto"


class MeasureName(str, enum.Enum):
    mass = "mass"
    accuracy = "accuracy"


def tune(
    directory: Annotated[Path, typer.Argument(help="Engine directory with weights that mean something.")],
    target: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of dense attention that every kind of prompt is to keep.")
    ] = 0.99,
    measure: Annotated[
        MeasureName, typer.Option(help="mass: of the attention weights; accuracy: of right answers (tasks only).")
    ] = MeasureName.mass,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines, each a prompt; half choose, half check.  Default: the tasks.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Tasks, of a model trained on them; by default those it answers.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a task's sample; by default those it was trained at.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of each task, to choose by; as many others check.")] = 8,
    queries: Annotated[int, typer.Option(min=1, help="Last tokens of each of --prompts to measure.")] = 16,
    keep_layout: Annotated[
        bool, typer.Option("--keep-layout", help="Keep L and R: caches that are filled stay of use.")
    ] = False,
    min_length: Annotated[
        str,
        typer.Option(help="auto: dense where the GPU is predicted to be faster so (TensorRT engines); or a number."),
    ] = AUTO,
    at: Annotated[
        str | None, typer.Option(help="Decode steps to be fast: BATCHxTOKENS; by default one of the longest sequence.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Whose measured cost model predicts speed.")] = DEFAULT,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the tasks' samples.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Choose and check, write nothing.")] = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the trade-off to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Choose budget, tau, L, R and min_length for a wanted share of dense attention, and write them into the engine.

    Measured with PyTorch on the engine's checkpoint; what was chosen is checked on prompts that had no part in it.
    """
    engine = EngineDirectory.open(directory)
    manifest = engine.manifest
    fixed_min_length = _min_length(min_length, manifest.backend, manifest.socket)
    with needs("export", "tuning", {"matplotlib": "plot"}):
        from socket_trt.engine.retune import changes, changes_layout, check_retunable, retune
        from socket_trt.quality.tuner import Workload, final_config, plot
        from socket_trt.quality.tuner import tune as choose
        from socket_trt.validation.torch_reference import load_model

        check_outputs(None, plot_file)
    check_retunable(engine)
    step = _only(parse_cases("--at", at)) if at is not None else Case(1, manifest.max_seq_len)
    calibration, held_out = _groups(engine, prompts, suite, length, samples, seed, queries)
    shape = Shape(manifest.model.query_heads, manifest.model.kv_heads, manifest.model.head_size)
    workload = Workload(load_cost_model(gpu), shape, step.batch, step.context, manifest.max_seq_len)
    progress = RichProgress()
    with progress.task("Loading the model"):
        import torch

        model = load_model(engine).to("cuda" if torch.cuda.is_available() else "cpu")
    tuning = choose(
        model,
        manifest.socket,
        target,
        measure.value,
        calibration,
        held_out,
        workload,
        progress,
        keep_layout=keep_layout,
    )
    socket = final_config(tuning, fixed_min_length)
    different = changes(manifest.socket, socket)
    layout, had_plan = changes_layout(manifest.socket, socket), manifest.plan is not None
    if plot_file is not None:
        plot(tuning, plot_file)
    if not dry_run:
        retune(engine, socket)
    if as_json:
        out.print_json(data={**tuning.as_dict(), "written": not dry_run, "config": socket.model_dump(mode="json")})
    else:
        print_tuning(tuning, directory)
        rows = [(name, str(old), str(new), _effect(name, manifest.backend)) for name, (old, new) in different.items()]
        title = "Would change" if dry_run else f"Written to {directory}"
        out.print(table(title, ("parameter", "was", "is", "takes effect"), rows))
    if tuning.reached < target - 0.02:
        err.print(
            f"[yellow]held-out prompts keep {tuning.reached:.1%}: more --samples, or more prompts, choose better[/]"
        )
    if not dry_run and manifest.backend == "tensorrt":
        removed = "; its plan was of the old graph and is removed" if had_plan else ""
        err.print(f"[yellow]next: socket-trt compile {escape(str(directory))}{removed}[/]")
    if not dry_run and layout:
        err.print("[dim]L, R or the seed changed: caches filled before are of no use, and take another size[/]")


def _effect(name: str, backend: str) -> str:
    """When a parameter takes effect.  Every one is in the graph; what a TensorRT plan took from it stays in the plan."""
    if backend == "tensorrt":
        return "with the next compile"
    return "at once, new cache size" if name in ("tables", "planes") else "at once"


def print_tuning(tuning: Tuning, directory: Path) -> None:
    """The trade-off, what was chosen among, and what the choice keeps of other prompts."""
    work, dense = tuning.workload, tuning.dense_microseconds
    chosen = tuning.chosen.socket
    title = (
        f"{directory}: attention mass kept (least of all groups) with L = {chosen.tables}, R = {chosen.planes}, "
        f"tau = {chosen.temperature:g}; one layer's attention, {work.batch} x {work.length} tokens, predicted for {work.cost.gpu}"
    )
    rows = [
        (
            f"{point.socket.budget_permille / 10:g} %",
            f"{point.kept:.2%}",
            f"{point.microseconds:.1f}",
            f"{dense / point.microseconds:.2f}x",
            "<- chosen" if point.socket == chosen else "",
        )
        for point in tuning.points
    ]
    out.print(table(title, ("budget", "mass", "microseconds", "against dense", ""), rows))
    cheapest = [
        (str(p.socket.tables), str(p.socket.planes), f"{p.socket.temperature:g}", f"{p.socket.budget_permille / 10:g} %",
         f"{p.kept:.2%}", f"{p.microseconds:.1f}", f"{dense / p.microseconds:.2f}x")
        for p in tuning.others
    ]  # fmt: skip
    head = ("L", "R", "tau", "budget", f"{tuning.measure} kept", "microseconds", "against dense")
    out.print(table(f"Cheapest setting of each L and R that keeps {tuning.target:.1%}", head, cheapest))
    kept = [(name, f"{share:.2%}", f"{tuning.before_held_out[name]:.2%}") for name, share in tuning.held_out.items()]
    out.print(table(f"{tuning.measure} kept of held-out prompts; target {tuning.target:.1%}",
                    ("prompts", "chosen", "before"), kept))  # fmt: skip
    out.print(
        f"predicted: {tuning.chosen.microseconds:.1f} us a layer, before {tuning.before.microseconds:.1f}, dense {dense:.1f}"
    )
    crossover = work.crossover(chosen)
    faster = (
        f"from {crossover} tokens on" if crossover is not None else f"at none of the {work.longest} tokens it can hold"
    )
    out.print(f"SOCKET is predicted to be faster than dense attention {faster}, batch {work.batch}")


def _min_length(text: str, backend: str, socket: SocketConfig) -> int | None:
    """None: to be predicted.  The cost model is a GPU's, so an engine for ONNX Runtime keeps its own."""
    if text == AUTO:
        return None if backend == "tensorrt" else socket.min_length
    if not text.isdigit():
        raise ConfigError(f"--min-length {text}: give {AUTO} or a number of tokens")
    return SocketConfig.create(min_length=int(text)).min_length


def _only(cases: list[Case]) -> Case:
    if len(cases) > 1:
        raise ConfigError("--at: speed is predicted for one case, such as 1x128K")
    return cases[0]


def _groups(
    engine: EngineDirectory,
    prompts: Path | None,
    suite: str | None,
    length: int | None,
    samples: int,
    seed: int,
    queries: int,
) -> tuple[list[Group], list[Group]]:
    """What to choose by, and what to check with."""
    if prompts is not None:
        if suite is not None:
            raise ConfigError("--prompts and --suite exclude each other")
        found = read_prompts(prompts, engine, queries)
        return [Group(PROMPTS, tuple(found[::2]))], [Group(PROMPTS, tuple(found[1::2]))]
    trained = trained_on_tasks(engine)
    if trained is None and suite is None:
        raise ConfigError(
            f"{engine.path}: its model was not trained on the synthetic tasks: give --prompts FILE, a few of your own"
        )
    vocabulary = trained.vocabulary if trained else Vocabulary(engine.manifest.model.vocabulary_size)
    tasks = parse_suite(suite) if suite is not None else trained.tasks if trained else ()
    tokens = length or (trained.length if trained else 512)
    if tokens > engine.manifest.max_seq_len:
        raise ConfigError(f"--length {tokens}: this engine holds {engine.manifest.max_seq_len} tokens a sequence")
    return (
        task_groups(tasks, tokens, 0, samples, seed, vocabulary),
        task_groups(tasks, tokens, samples, samples, seed, vocabulary),
    )
