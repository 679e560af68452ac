"""What sparsity costs: methods side by side on tasks a trained model answers, at equal tokens kept.

    python -m benchmarks.train_retriever --size small --output build/retriever-small
    python -m benchmarks.quality --checkpoint build/retriever-small --length 512 --name quality-cpu

Contexts are prefilled densely; questions and answers are decoded, each decode query of every layer attending to what the
method chooses (the reference semantics, in float32).  Tasks that dense attention answers with less than 95 % are left out,
and said to be.  Writes NAME.json, NAME.md and NAME.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from socket_trt.cli.console import RichProgress
from socket_trt.errors import SocketTrtError
from socket_trt.quality.attention import Choice, Decoder, chosen_attention
from socket_trt.quality.measures import Attention, Share, measure
from socket_trt.quality.methods import COMPARED, Dense, Method, Socket
from socket_trt.quality.tasks import TASKS, Sample, make_sample, score
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

Maker = Callable[[int], Method]
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


def seeds_of(make: Maker, seeds: int) -> range:
    return range(seeds if make(0).draws else 1)


def shares(arguments: argparse.Namespace) -> dict[str, Share]:
    return {name: Share(kept, arguments.sink, arguments.window) for name, kept in KEPT.items()}


def attentions(decoder: Decoder, samples: Sequence[Sample], dense: Choice) -> list[tuple[int, Attention]]:
    """(layer, attention) of every decode query of the samples' right answers, as dense attention comes to it."""
    seen: list[tuple[int, Attention]] = []
    decoder.choice, decoder.observe = dense, lambda layer, attention: seen.append((layer, attention))
    decoder.answer(samples)
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


def run(model: transformers.PreTrainedModel, vocabulary: Vocabulary, arguments: argparse.Namespace) -> dict[str, Any]:
    dense = Choice(Dense(), Share(1.0, 0, 1))
    report: dict[str, Any] = {"dense": {}, "left_out": {}, "accuracy": [], "measures": [], "sweep": []}
    progress = RichProgress()
    budgets = shares(arguments)
    with chosen_attention(model):
        for task in arguments.tasks:
            scores: dict[tuple[str, str, int], list[float]] = defaultdict(list)
            makers = [make for make in COMPARED if not isinstance(make(0), Dense)]
            cases = [
                (kept, make, seed)
                for kept, make in itertools.product(budgets, makers)
                for seed in seeds_of(make, arguments.plane_seeds)
            ]
            whole: list[float] = []
            parts = list(batches(task, arguments, vocabulary))
            decoders = [Decoder(model, [sample.context for sample in part], dense) for part in parts]
            for decoder, part in zip(decoders, parts, strict=True):
                whole += accuracy(decoder, part)
            report["dense"][task] = float(np.mean(whole))
            if report["dense"][task] < NEEDED:
                report["left_out"][task] = report["dense"].pop(task)
                continue
            some = parts[0][: arguments.measured]
            first = attentions(Decoder(model, [sample.context for sample in some], dense), some, dense)
            with progress.task(f"{task}: {len(cases)} methods and budgets", len(cases)) as advance:
                for kept, make, seed in cases:
                    method = make(seed)
                    for decoder, part in zip(decoders, parts, strict=True):
                        decoder.choice = Choice(method, budgets[kept])
                        scores[kept, method.name, seed] += accuracy(decoder, part)
                    for layer, means in mean_measures(first, method, budgets[kept]).items():
                        report["measures"].append(
                            {"task": task, "layer": layer, "kept": kept, "method": method.name, "seed": seed, **means}
                        )
                    advance(1)
            report["accuracy"] += [
                {"task": task, "kept": kept, "method": name, "seed": seed, "accuracy": float(np.mean(found))}
                for (kept, name, seed), found in scores.items()
            ]
            for parameter, values in SWEEP.items():
                for value, seed in itertools.product(values, range(arguments.plane_seeds)):
                    method = Socket(**{parameter: value}, seed=seed)
                    for layer, means in mean_measures(first, method, budgets[SWEEP_KEPT]).items():
                        row = {"task": task, "layer": layer, "parameter": parameter, "value": value, "seed": seed}
                        report["sweep"].append(row | means)
    return report


def spread(values: Sequence[float], digits: int = 1, scale: float = 100.0) -> str:
    """Mean, and the standard deviation where there are several."""
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
    lines.append("Over all decode queries, layers and heads of some samples of each task above.\n")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="written by benchmarks/train_retriever.py")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="by default those it answers well")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--measured", type=int, default=8, help="samples whose attention is measured")
    parser.add_argument("--batch", type=int, default=16, help="samples decoded together")
    parser.add_argument("--plane-seeds", type=int, default=3)
    parser.add_argument("--sink", type=int, default=4)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; small matrices gain nothing from more")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="quality")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    training = json.loads((arguments.checkpoint / "training.json").read_text())
    arguments.tasks = arguments.tasks or list(training["accuracy"])
    vocabulary = Vocabulary(**training["vocabulary"])
    model = transformers.LlamaForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    try:
        report = run(model.to(arguments.device).eval(), vocabulary, arguments)
    except SocketTrtError as error:
        sys.exit(f"error: {error}")
    machine = torch.cuda.get_device_name() if arguments.device != "cpu" else "a CPU, no GPU"
    options = {name: value for name, value in vars(arguments).items() if name not in ("checkpoint", "output")}
    command = " ".join(["python -m benchmarks.quality", *sys.argv[1:]])
    about = {"command": command, "machine": machine, "python": platform.python_version(), "torch": torch.__version__}
    report = {"about": about | options, "training": training, **report}
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = arguments.output / arguments.name
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    if report["dense"]:
        plot(report, stem.with_suffix(".png"))
    print(markdown(report))


if __name__ == "__main__":
    main()
