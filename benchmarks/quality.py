"""What sparsity costs: methods side by side on tasks a trained model answers, at equal tokens kept.

    python -m benchmarks.train_retriever --size small --output build/retriever-small
    python -m benchmarks.quality --checkpoint build/retriever-small --length 512 --name quality-cpu

Contexts are prefilled densely; questions and answers are decoded, each decode query of every layer attending to what the
method chooses (the reference semantics, in float32).  Tasks that dense attention answers with less than 95 % are left out,
and said to be.  SOCKET is then run again through `torch.ops.socket_trt.attention` on a paged cache, which on a GPU is the
native library in float16, and must give the same answers.

Writes NAME.json, NAME.md and NAME.png, as far as they go after every task of every seed: a run that `--time-limit` ends, or
something else, leaves what it had.  `--report NAME.json` writes the other two from a file alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.files import write_results
from socket_trt.cli.console import RichProgress
from socket_trt.config import Selection, SocketConfig
from socket_trt.errors import SocketTrtError
from socket_trt.native import library_path
from socket_trt.progress import Silent
from socket_trt.quality.attention import Choice, Decoder, chosen_attention
from socket_trt.quality.evaluate import EvalOptions, answer_all
from socket_trt.quality.measures import Attention, Share, measure
from socket_trt.quality.methods import COMPARED, Dense, Method, Socket
from socket_trt.quality.tasks import TASKS, Sample, make_sample, score
from socket_trt.quality.torch_session import TorchSession
from socket_trt.quality.tuning import socket_method
from socket_trt.quality.vocabulary import Vocabulary

KEPT = {"1/5": 1 / 5, "1/10": 1 / 10, "1/20": 1 / 20, "1/33": 1 / 33, "1/50": 1 / 50}
NEEDED = 0.95  # dense accuracy of a task that is used
MEASURES = ("mass", "recall", "error")
# One parameter at a time, the others as the project's defaults have them.
SWEEP = {
    "tables": (10, 20, 40, 60, 90, 120),
    "planes": (2, 4, 6, 8, 10),
    "temperature": (0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
}
SWEEP_KEPT = "1/33"
LIBRARY_KEPT = ("1/10", "1/33")
AGREE = 0.95  # of the answers

Row = dict[str, Any]


def batches(task: str, arguments: argparse.Namespace, vocabulary: Vocabulary) -> Iterator[list[Sample]]:
    for first in range(0, arguments.samples, arguments.batch):
        last = min(first + arguments.batch, arguments.samples)
        yield [make_sample(task, arguments.length, i, arguments.seed, vocabulary) for i in range(first, last)]


def accuracy(decoder: Decoder, samples: Sequence[Sample]) -> list[float]:
    """Score of each sample: the mean of its turns'."""
    return [
        float(np.mean([score(turn, tokens) for turn, tokens in zip(sample.turns, generated, strict=True)]))
        for sample, generated in zip(samples, decoder.answer(samples), strict=True)
    ]


def shares(arguments: argparse.Namespace) -> dict[str, Share]:
    return {name: Share(kept, arguments.sink, arguments.window) for name, kept in KEPT.items()}


def attentions(decoder: Decoder, samples: Sequence[Sample], dense: Choice) -> list[tuple[int, Attention]]:
    """(layer, attention) of every decode query of the samples' first right answers, as dense attention comes to it."""
    seen: list[tuple[int, Attention]] = []
    decoder.choice, decoder.observe = dense, lambda layer, attention: seen.append((layer, attention))
    decoder.answer([dataclasses.replace(sample, turns=sample.turns[:1]) for sample in samples])
    return seen


def mean_measures(seen: Sequence[tuple[int, Attention]], method: Method, share: Share) -> dict[int, dict[str, float]]:
    """Mean of each measure by layer."""
    found: dict[int, list[Any]] = defaultdict(list)
    for layer, attention in seen:
        attributes = share(attention.keys.shape[1], attention)
        found[layer].append(measure(attention, method, attributes))
    return {
        layer: {name: float(np.mean([getattr(kept, name) for kept in all_kept])) for name in MEASURES}
        for layer, all_kept in found.items()
    }


class Comparison:
    """All methods on one model; `report` holds what is known so far."""

    def __init__(
        self, model: transformers.PreTrainedModel, vocabulary: Vocabulary, arguments: argparse.Namespace
    ) -> None:
        self.model, self.vocabulary, self.arguments = model, vocabulary, arguments
        self.report: dict[str, Any] = {
            "dense": {}, "left_out": {}, "accuracy": [], "measures": [], "sweep": [], "library": [], "cut_short": False,
        }  # fmt: skip
        self._dense = Choice(Dense(), Share(1.0, 0, 1))
        self._budgets = shares(arguments)
        self._begin = time.monotonic()

    @property
    def out_of_time(self) -> bool:
        limit = self.arguments.time_limit
        return limit is not None and time.monotonic() - self._begin > limit

    def run(self, keep: Callable[[], None]) -> dict[str, Any]:
        """The report; `keep` is called whenever there is more of it.

        Seeds come outermost, so that a run which is cut short has every method on every task from the first ones.
        """
        with chosen_attention(self.model):
            for task in self.arguments.tasks:
                right = self._dense_accuracy(task)
                self.report["dense" if right >= NEEDED else "left_out"][task] = right
            keep()
        self._library()
        keep()
        with chosen_attention(self.model):
            for seed, task in itertools.product(range(self.arguments.plane_seeds), self.report["dense"]):
                self._methods(task, seed)
                keep()
        return self.report

    def _dense_accuracy(self, task: str) -> float:
        scores: list[float] = []
        for part in batches(task, self.arguments, self.vocabulary):
            scores += accuracy(Decoder(self.model, [sample.context for sample in part], self._dense), part)
        return float(np.mean(scores))

    def _methods(self, task: str, seed: int) -> None:
        """Every method and budget on a task with one seed, and the sweep of SOCKET's parameters."""
        made = [made for make in COMPARED if (made := make(seed)).name in self.arguments.methods]
        methods = [method for method in made if not isinstance(method, Dense) and (method.draws or seed == 0)]
        cases = [*itertools.product(self._budgets, methods)]
        parts = list(batches(task, self.arguments, self.vocabulary))
        if self.out_of_time:
            self.report["cut_short"] = True
            return
        decoders = [Decoder(self.model, [sample.context for sample in part], self._dense) for part in parts]
        some = parts[0][: self.arguments.measured]
        seen = attentions(Decoder(self.model, [sample.context for sample in some], self._dense), some, self._dense)
        with RichProgress().task(f"{task}, seed {seed}: {len(cases)} methods and budgets", len(cases)) as advance:
            for kept, method in cases:
                if self.out_of_time:
                    self.report["cut_short"] = True
                    return
                scores: list[float] = []
                for decoder, part in zip(decoders, parts, strict=True):
                    decoder.choice = Choice(method, self._budgets[kept])
                    scores += accuracy(decoder, part)
                row = {"task": task, "kept": kept, "method": method.name, "seed": seed}
                self.report["accuracy"].append({**row, "accuracy": float(np.mean(scores))})
                for layer, means in mean_measures(seen, method, self._budgets[kept]).items():
                    self.report["measures"].append({**row, "layer": layer, **means})
                advance(1)
        for parameter, values in SWEEP.items():
            for value in values:
                method = Socket(**{parameter: value}, seed=seed)
                for layer, means in mean_measures(seen, method, self._budgets[SWEEP_KEPT]).items():
                    row = {"task": task, "layer": layer, "parameter": parameter, "value": value, "seed": seed}
                    self.report["sweep"].append(row | means)

    def _library(self) -> None:
        """SOCKET through the operator on a paged cache, beside the reference semantics with the same configuration."""
        arguments = self.arguments
        if arguments.library_samples == 0:
            return
        on_gpu = self.model.device.type == "cuda"
        if on_gpu and library_path() is None:
            self.report["library_missing"] = "the native library is not built (docs/development.md)"
            return
        tasks, count = tuple(self.report["dense"]), arguments.library_samples
        options = EvalOptions(tasks, arguments.length, count, arguments.seed, self.vocabulary)
        wanted = [(task, index) for task in tasks for index in range(count)]
        for kept, selection in itertools.product(LIBRARY_KEPT, Selection):
            tokens = int(arguments.length * KEPT[kept]) - arguments.sink - arguments.window
            socket = SocketConfig.create(
                sink=arguments.sink,
                window=arguments.window,
                budget_tokens=tokens,
                budget_permille=0,
                selection=selection,
                min_length=0,
            )
            expected = self._reference_answers(tasks, count, socket)
            dtype = torch.float16 if on_gpu else torch.float32
            copy = transformers.AutoModelForCausalLM.from_config(deepcopy(self.model.config), dtype=dtype)
            copy.load_state_dict(self.model.state_dict())
            session = TorchSession(copy.to(self.model.device, dtype).eval(), socket, arguments.length, 8)
            found = {(result.task, result.index): result for result in answer_all(session, wanted, options, Silent())}
            for task in tasks:
                keys = [(task, index) for index in range(count)]
                self.report["library"].append(
                    {
                        "task": task,
                        "kept": kept,
                        "selection": selection.name,
                        "computed_by": f"the native library, {dtype}" if on_gpu else f"the reference operator, {dtype}",
                        "accuracy": float(np.mean([found[key].score for key in keys])),
                        "reference": float(np.mean([expected[key][0] for key in keys])),
                        "same": float(np.mean([found[key].generated == expected[key][1] for key in keys])),
                    }
                )

    def _reference_answers(
        self, tasks: Sequence[str], count: int, socket: SocketConfig
    ) -> dict[tuple[str, int], tuple[float, list[list[int]]]]:
        choice = Choice(socket_method(socket), lambda _, a: socket.attributes(a.scale, a.sliding_window, a.softcap))
        answers = {}
        with chosen_attention(self.model):
            for task in tasks:
                for first in range(0, count, self.arguments.batch):
                    indices = range(first, min(first + self.arguments.batch, count))
                    part = [
                        make_sample(task, self.arguments.length, i, self.arguments.seed, self.vocabulary)
                        for i in indices
                    ]
                    decoder = Decoder(self.model, [sample.context for sample in part], self._dense)
                    decoder.choice = choice
                    for index, sample, said in zip(indices, part, decoder.answer(part), strict=True):
                        right = [score(turn, tokens) for turn, tokens in zip(sample.turns, said, strict=True)]
                        answers[task, index] = float(np.mean(right)), said
        return answers


def agreement(report: dict[str, Any]) -> float:
    """Share of the answers that the operator gave as the reference semantics did; 1 where none was asked for."""
    return float(np.mean([row["same"] for row in report["library"]])) if report["library"] else 1.0


def spread(values: Sequence[float], digits: int = 1, scale: float = 100.0) -> str:
    """Mean, and the standard deviation where there are several."""
    if not len(values):
        return ""
    text = f"{scale * np.mean(values):.{digits}f}"
    return f"{text} ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def by_seed(rows: Sequence[Row], figure: str, **wanted: Any) -> list[float]:
    """`figure` of the rows that match, averaged over all but the seed."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if all(row[name] == want for name, want in wanted.items()):
            found[row["seed"]].append(row[figure])
    return [float(np.mean(values)) for values in found.values()]


def markdown(report: dict[str, Any]) -> str:
    about, trained = report["about"], report["training"]
    methods = list(dict.fromkeys(row["method"] for row in report["accuracy"]))
    lines = [
        f"# What sparsity costs: {about['length']} tokens\n",
        f"Written by `{about['command']}` on {about['machine']}; torch {about['torch']}, float32.\n",
        f"The model: {trained['layers']} layers, {trained['query_heads']} query heads, {trained['kv_heads']} KV heads of "
        f"{trained['head_size']}, {trained['parameters']} parameters, trained by `benchmarks/train_retriever.py` (seed "
        f"{trained['seed']}). Kept: share of all tokens that a decode query attends to, sink ({about['sink']}) and window "
        f"({about['window']}) among them. {about['samples']} samples a task, {about['measured']} of them measured; mean ± standard deviation over "
        f"{about['plane_seeds']} seeds of planes (or draws).\n",
    ]
    if report["left_out"]:
        left = ", ".join(f"{task} ({value:.0%})" for task, value in report["left_out"].items())
        lines.append(f"Left out, because dense attention itself answers less than {NEEDED:.0%} right: {left}.\n")
    if report["cut_short"]:
        lines.append("The run was cut short: later seeds are missing, or some of their tasks and methods.\n")
    for task, whole in report["dense"].items():
        lines += [f"## {task}: {TASKS[task].description}\n", f"Answers right, %; dense attention: {whole:.1%}.\n"]
        lines += table(
            methods, lambda method, kept, task=task: spread(by_seed(report["accuracy"], "accuracy", task=task, method=method, kept=kept))
        )  # fmt: skip
    titles = {
        "mass": "Attention mass kept, %",
        "recall": "Recall of the true best tokens, %",
        "error": "Relative error of the output, %",
    }
    lines.append("## What is kept of dense attention\n")
    lines.append(
        "Over the decode queries of the first question, all layers and heads, of some samples of each task above.\n"
    )
    for name, title in titles.items():
        lines.append(f"### {title}\n")
        lines += table(
            methods, lambda method, kept, name=name: spread(by_seed(report["measures"], name, method=method, kept=kept))
        )
    lines.append(f"## SOCKET's parameters, at {SWEEP_KEPT} kept\n")
    lines += ["One changed at a time from 60 tables of 8 planes at temperature 0.3.\n"]
    lines += ["| parameter | value | mass, % | recall, % | error, % |", "|---|---|---|---|---|"]
    for parameter, values in SWEEP.items():
        for value in values:
            cells = [spread(by_seed(report["sweep"], name, parameter=parameter, value=value)) for name in MEASURES]
            lines.append(f"| {parameter} | {value} | {' | '.join(cells)} |")
    lines.append("\n## The operator on a paged cache\n")
    if "library_missing" in report:
        lines.append(f"Not run: {report['library_missing']}.")
    elif not report["library"]:
        lines.append("Not asked for.")
    else:
        lines.append(f"Of all answers {agreement(report):.1%} are the very ones of the reference semantics.\n")
        lines += [
            "| task | kept | selection | computed by | right, % | reference | same answers |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['task']} | {row['kept']} | {row['selection']} | {row['computed_by']} | {100 * row['accuracy']:.1f} "
            f"| {100 * row['reference']:.1f} | {row['same']:.1%} |"
            for row in report["library"]
        ]
    return "\n".join(lines) + "\n"


def table(methods: Sequence[str], cell: Callable[[str, str], str]) -> list[str]:
    head = ["| method | " + " | ".join(KEPT) + " |", "|---" * (1 + len(KEPT)) + "|"]
    return [*head, *(f"| {method} | {' | '.join(cell(method, kept) for kept in KEPT)} |" for method in methods), ""]


def plot(report: dict[str, Any], path: Path) -> None:
    """A panel a task (answers right by kept share), and one for the attention mass."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(row["method"] for row in report["accuracy"]))
    panels = [*report["dense"], "attention mass kept"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows + 1.2), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes, panels, strict=False):
        for number, method in enumerate(methods):
            if panel in report["dense"]:
                found = [by_seed(report["accuracy"], "accuracy", task=panel, method=method, kept=kept) for kept in KEPT]
            else:
                found = [by_seed(report["measures"], "mass", method=method, kept=kept) for kept in KEPT]
            if not all(found):
                continue  # cut short before it
            mean = np.array([100 * np.mean(values) for values in found])
            low, high = ([100 * bound(values) for values in found] for bound in (min, max))
            style = "-" if method.startswith("SOCKET") else ":" if method.startswith("hard") else "--"
            colour = colormaps["tab20"](number)
            axis.plot(range(len(KEPT)), mean, style, marker="o", markersize=3, color=colour, label=method)
            axis.fill_between(range(len(KEPT)), low, high, color=colour, alpha=0.12, linewidth=0)
        if panel in report["dense"]:
            axis.axhline(100 * report["dense"][panel], color="black", linewidth=0.8, label="dense")
        axis.set(title=panel, xticks=range(len(KEPT)), xticklabels=list(KEPT), xlabel="tokens kept", ylim=(-3, 103))
        axis.set_ylabel("answers right, %" if panel in report["dense"] else "%")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def write(report: dict[str, Any], stem: Path) -> None:
    """NAME.json and, of it, NAME.md."""
    write_results(stem, report, markdown(report))


def draw(report: dict[str, Any], stem: Path) -> None:
    """NAME.png, where there is something to draw and something to draw with."""
    try:
        if report["accuracy"]:
            plot(report, stem.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(
            f"no plot: {error}; where matplotlib is: python -m benchmarks.quality --report {stem.name}.json",
            file=sys.stderr,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="written by benchmarks/train_retriever.py")
    source.add_argument("--report", type=Path, help="write text and plot of this NAME.json again, beside it")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="by default those it answers well")
    names = [make(0).name for make in COMPARED]
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="NAME", help="by default all")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--measured", type=int, default=8, help="samples whose attention is measured")
    parser.add_argument("--library-samples", type=int, default=8, help="samples that the operator answers too; 0: none")
    parser.add_argument("--batch", type=int, default=16, help="samples decoded together")
    parser.add_argument("--plane-seeds", type=int, default=3)
    parser.add_argument("--sink", type=int, default=4)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further method begins")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; small matrices gain nothing from more")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="quality")
    arguments = parser.parse_args()
    if arguments.report is not None:
        report, stem = json.loads(arguments.report.read_text()), arguments.report.with_suffix("")
        write(report, stem)
        draw(report, stem)
        return
    torch.set_num_threads(arguments.threads)
    training = json.loads((arguments.checkpoint / "training.json").read_text())
    arguments.tasks = arguments.tasks or [task for task, right in training["accuracy"].items() if right >= NEEDED]
    vocabulary = Vocabulary(**training["vocabulary"])
    model = transformers.LlamaForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    machine = torch.cuda.get_device_name() if arguments.device != "cpu" else f"{arguments.threads} CPU threads, no GPU"
    options = {k: v for k, v in vars(arguments).items() if k not in ("checkpoint", "output", "report")}
    command = "python -m benchmarks.quality " + shlex.join(sys.argv[1:])
    about = {"command": command, "machine": machine, "python": platform.python_version(), "torch": torch.__version__}
    comparison = Comparison(model.to(arguments.device).eval(), vocabulary, arguments)
    stem = arguments.output / arguments.name

    def whole() -> dict[str, Any]:
        return {"about": about | options, "training": training, **comparison.report}

    try:
        comparison.run(lambda: write(whole(), stem))
    except SocketTrtError as error:
        sys.exit(f"error: {error}")
    draw(whole(), stem)
    print(markdown(whole()))
    if agreement(comparison.report) < AGREE:
        sys.exit(
            f"the operator and the reference agree on {agreement(comparison.report):.1%} of the answers, not {AGREE:.0%}"
        )


if __name__ == "__main__":
    main()
