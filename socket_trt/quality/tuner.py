"""The choice among what `tuning` measured: the setting that keeps the target everywhere and is predicted to cost least."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from socket_trt.config import SocketConfig
from socket_trt.cost import CostModel, Shape
from socket_trt.errors import ConfigError
from socket_trt.progress import Progress
from socket_trt.quality.calibration import Group
from socket_trt.quality.tuning import (
    ANSWERED_TABLES,
    COARSE,
    PERMILLES,
    Answering,
    Candidate,
    Curves,
    budget_at,
    candidates,
    mass_curves,
    mass_kept,
    with_candidate,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Measure = Literal["mass", "accuracy"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is to be fast: decode steps of `batch` sequences of `length` tokens, on the GPU of `cost`.

    longest  tokens of a sequence at most
    """

    cost: CostModel
    shape: Shape
    batch: int
    length: int
    longest: int

    def socket_us(self, socket: SocketConfig) -> float:
        return self.cost.socket_us(self.shape, socket, self.batch, self.length)

    @property
    def dense_us(self) -> float:
        return self.cost.dense_us(self.shape, self.batch, self.length)

    def crossover(self, socket: SocketConfig) -> int | None:
        return self.cost.crossover(self.shape, socket, self.batch, self.longest)


@dataclasses.dataclass(frozen=True)
class Point:
    """A setting, the least share that it kept of any group while calibrating, and its predicted time."""

    socket: SocketConfig
    kept: float
    microseconds: float

    def as_dict(self) -> dict[str, Any]:
        return {"socket": self.socket.model_dump(mode="json"), "kept": self.kept, "microseconds": self.microseconds}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """points: of the chosen (L, R, tau), budgets of `tuning.COARSE` and the choice; others: of every (L, R), the cheapest that reaches the target.

    held_out  share kept of prompts that had no part in the choice, by group
    before    the engine's own setting: its predicted time, and what it keeps of the held-out prompts
    """

    measure: Measure
    target: float
    chosen: Point
    points: list[Point]
    others: list[Point]
    held_out: dict[str, float]
    before: Point
    before_held_out: dict[str, float]
    dense_microseconds: float
    workload: Workload

    @property
    def reached(self) -> float:
        """The least share kept of any held-out group."""
        return min(self.held_out.values())

    def as_dict(self) -> dict[str, Any]:
        workload = self.workload
        return {
            "measure": self.measure,
            "target": self.target,
            "chosen": self.chosen.as_dict(),
            "before": self.before.as_dict(),
            "held_out": self.held_out,
            "before_held_out": self.before_held_out,
            "points": [point.as_dict() for point in self.points],
            "others": [point.as_dict() for point in self.others],
            "dense_microseconds": self.dense_microseconds,
            "workload": {"gpu": workload.cost.gpu, "batch": workload.batch, "length": workload.length},
        }


def tune(
    model: PreTrainedModel,
    socket: SocketConfig,
    target: float,
    measure: Measure,
    calibration: Sequence[Group],
    held_out: Sequence[Group],
    workload: Workload,
    progress: Progress,
    *,
    keep_layout: bool = False,
) -> Tuning:
    """Choose for an engine with `socket`; sink, window, selection and page size stay its own.

    target  share of attention mass, or of dense attention's accuracy, that every calibration group is to keep

    Raises ConfigError where sequences are too short for any token to be left out, and for accuracy without samples.
    """
    shortest = min(length for group in calibration for length in group.lengths)
    if shortest <= socket.sink + socket.window:
        raise ConfigError(
            f"the shortest prompt has {shortest} tokens, sink and window have {socket.sink} + {socket.window}: give longer "
            "prompts, of the lengths that you will serve"
        )
    if measure == "accuracy" and not all(group.samples for group in calibration):
        raise ConfigError(
            "--measure accuracy needs prompts whose right answers are known: tasks (--suite), not --prompts"
        )
    curves = mass_curves(model, calibration, socket, candidates(socket, keep_layout), progress)

    def point(candidate: Candidate, permille: int, kept: float) -> Point:
        setting = budget_at(with_candidate(socket, candidate), permille, shortest)
        return Point(setting, kept, workload.socket_us(setting))

    def checker(groups: Sequence[Group]) -> Callable[[SocketConfig], dict[str, float]]:
        if measure == "mass":
            return lambda setting: mass_kept(model, groups, setting, progress)
        return Answering(model, groups, progress).kept

    if measure == "mass":
        found = []
        for candidate in curves:
            kept = _least(curves[candidate])
            index = _first(kept, target)
            found.append(point(candidate, PERMILLES[index], kept[index]))
    else:
        check = checker(calibration)

        def answered(candidate: Candidate, permille: int) -> Point:
            return point(candidate, permille, min(check(point(candidate, permille, 0.0).socket).values()))

        found = [
            _bisect(functools.partial(answered, candidate), target) for candidate in _answered_with(curves, socket)
        ]
    chosen = min(found, key=_cost)
    best = Candidate(chosen.socket.tables, chosen.socket.planes, chosen.socket.temperature)
    before = socket.model_copy(update={"min_length": 0})
    check = checker(held_out)
    before_held_out = check(before)
    return Tuning(
        measure=measure,
        target=target,
        chosen=chosen,
        points=[
            point(best, permille, kept)
            for permille, kept in zip(PERMILLES, _least(curves[best]), strict=True)
            if permille in {*COARSE, chosen.socket.budget_permille}
        ],
        others=_cheapest_by_size(found),
        held_out=check(chosen.socket),
        before=Point(before, min(before_held_out.values()), workload.socket_us(before)),
        before_held_out=before_held_out,
        dense_microseconds=workload.dense_us,
        workload=workload,
    )


def _cost(point: Point) -> tuple[float, float]:
    """Cheapest first; of those that cost the same, the one that keeps most."""
    return point.microseconds, -point.kept


def _least(by_group: Mapping[str, Any]) -> list[float]:
    """The least of all groups at each budget."""
    return [float(min(values)) for values in zip(*by_group.values(), strict=True)]


def _first(kept: Sequence[float], target: float) -> int:
    """Index of the smallest budget that reaches the target; the last one keeps everything."""
    return next((i for i, share in enumerate(kept) if share >= target), len(kept) - 1)


def _answered_with(curves: Curves, socket: SocketConfig) -> list[Candidate]:
    """Of the engine's R and of each of a few L, its own among them: the temperature that keeps most mass over all budgets."""
    best: dict[int, Candidate] = {}
    for candidate in curves:
        if candidate.planes != socket.planes or candidate.tables not in {*ANSWERED_TABLES, socket.tables}:
            continue
        other = best.get(candidate.tables)
        if other is None or sum(_least(curves[candidate])) > sum(_least(curves[other])):
            best[candidate.tables] = candidate
    return list(best.values())


def _bisect(at: Callable[[int], Point], target: float) -> Point:
    """The smallest budget of `COARSE` that reaches the target, taking what it keeps to grow with it."""
    low, high, best = -1, len(COARSE) - 1, at(COARSE[-1])
    while high - low > 1:
        middle = (low + high) // 2
        point = at(COARSE[middle])
        if point.kept >= target:
            high, best = middle, point
        else:
            low = middle
    return best


def _cheapest_by_size(found: Sequence[Point]) -> list[Point]:
    best: dict[tuple[int, int], Point] = {}
    for point in found:
        key = point.socket.tables, point.socket.planes
        if key not in best or _cost(point) < _cost(best[key]):
            best[key] = point
    return sorted(best.values(), key=_cost)


def final_config(tuning: Tuning, min_length: int | None) -> SocketConfig:
    """The chosen setting with its `min_length`; None: dense wherever that is predicted to be the faster one."""
    if min_length is None:
        crossover = tuning.workload.crossover(tuning.chosen.socket)
        min_length = tuning.workload.longest if crossover is None else max(0, crossover - 1)
    return tuning.chosen.socket.model_copy(update={"min_length": min_length})


def plot(tuning: Tuning, path: Path) -> None:
    """What is kept against the predicted time: every budget of the choice, and the cheapest of every (L, R)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    chosen = tuning.chosen
    name = f"L = {chosen.socket.tables}, R = {chosen.socket.planes}, tau = {chosen.socket.temperature:g}"
    axis.plot([p.microseconds for p in tuning.points], [100 * p.kept for p in tuning.points], "o-", markersize=3,
              label=f"{name}: attention mass kept")  # fmt: skip
    axis.plot([p.microseconds for p in tuning.others], [100 * p.kept for p in tuning.others], "x", color="gray",
              label="cheapest of every other L and R")  # fmt: skip
    axis.plot([chosen.microseconds], [100 * chosen.kept], "*", markersize=14, color="tab:red", label="chosen")
    axis.plot([tuning.before.microseconds], [100 * tuning.before.kept], "s", color="tab:green", label="before")
    axis.axhline(100 * tuning.target, color="black", linewidth=0.8, linestyle=":", label="target")
    axis.axvline(tuning.dense_microseconds, color="black", linewidth=0.8, linestyle="--", label="dense attention")
    work = tuning.workload
    axis.set(
        xlabel=f"microseconds a layer, {work.batch} x {work.length} tokens, predicted for {work.cost.gpu}",
        ylabel=f"{tuning.measure} kept, %",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
