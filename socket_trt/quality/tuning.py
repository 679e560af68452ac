"""Chooses SOCKET's parameters for a wanted share of dense attention: the cheapest setting that keeps it.

Every decode query of the calibration prompts is attended densely, and for each candidate (L, R, tau) its tokens are ordered by
score: the attention weights summed in that order are the mass that any budget would keep.  So one pass gives the whole
trade-off.  What a setting costs on a GPU comes from `socket_trt.cost`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes, Selection, SocketConfig, attended_budget
from socket_trt.planes import draw_planes
from socket_trt.progress import Progress
from socket_trt.quality.attention import Choice, Decoder, chosen_attention
from socket_trt.quality.calibration import Group, Prompt
from socket_trt.quality.measures import Attention, Share, measure, weights
from socket_trt.quality.methods import Dense, Socket
from socket_trt.quality.methods.base import per_query_head
from socket_trt.quality.tasks import Sample, score
from socket_trt.reference import bucket_probabilities, key_codes
from socket_trt.reference.selection import fixed_and_candidates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Budgets that are tried, tokens in 1000, and those that are shown or answered with: steps of about a quarter.
PERMILLES = range(1, 1001)
COARSE = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 63, 80, 100, 125, 160, 200, 250, 320, 400, 500, 630, 800, 1000)  # fmt: skip
TABLES = (20, 30, 40, 60, 90, 120)
PLANES = (8, 10)  # fewer than 8 take the same 8 bits a table
ANSWERED_TABLES = (30, 60)  # with which samples are answered: each takes as long as all of the above
TEMPERATURES = (0.15, 0.2, 0.3, 0.4, 0.5)
BATCH = 8  # prompts of one length that are decoded together

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, order=True)
class Candidate:
    """What the order of tokens depends on: L, R, tau."""

    tables: int
    planes: int
    temperature: float


Curves = dict[Candidate, dict[str, Floats]]  # by group: the mean share kept at each of PERMILLES


def candidates(socket: SocketConfig, keep_layout: bool) -> list[Candidate]:
    """What is tried; `keep_layout`: nothing that would change the caches of an engine with `socket`."""
    tables = (socket.tables,) if keep_layout else tuple(sorted({*TABLES, socket.tables}))
    planes = (socket.planes,) if keep_layout else tuple(sorted({*PLANES, socket.planes}))
    temperatures = tuple(sorted({*TEMPERATURES, socket.temperature}))
    return [Candidate(*each) for each in itertools.product(tables, planes, temperatures)]


def budget_at(socket: SocketConfig, permille: int, shortest: int) -> SocketConfig:
    """`socket` with a budget of `permille`; a sequence shorter than any that was measured keeps as many tokens as that."""
    return socket.model_copy(
        update={"budget_permille": permille, "budget_tokens": attended_budget(shortest, 0, permille), "min_length": 0}
    )


def with_candidate(socket: SocketConfig, candidate: Candidate) -> SocketConfig:
    return SocketConfig.create(**socket.model_dump() | dataclasses.asdict(candidate))


def mass_curves(
    model: PreTrainedModel,
    groups: Sequence[Group],
    socket: SocketConfig,
    tried: Sequence[Candidate],
    progress: Progress,
) -> Curves:
    """The share of attention mass that each candidate keeps at each budget: mean over queries, layers and heads."""
    sums: dict[tuple[Candidate, str], Floats] = defaultdict(lambda: np.zeros(len(PERMILLES)))
    counts: dict[str, int] = defaultdict(int)
    total = sum(len(group.prompts) for group in groups)
    with progress.task(f"Measuring {total} prompts with {len(tried)} settings", total) as advance:
        for group in groups:

            def observe(_: int, attention: Attention, name: str = group.name) -> None:
                counts[name] += len(attention.query)
                for candidate, kept in query_curves(_in_float32(attention), socket, tried):
                    sums[candidate, name] += kept

            feed_all(model, group, observe, advance)
    return {
        candidate: {group.name: sums[candidate, group.name] / counts[group.name] for group in groups}
        for candidate in tried
    }


def query_curves(
    attention: Attention, socket: SocketConfig, tried: Sequence[Candidate]
) -> Iterator[tuple[Candidate, Floats]]:
    """Of one decode query: the mass kept at each budget, summed over its heads, by candidate."""
    dense = weights(attention)
    length = dense.shape[1]
    attributes = socket.attributes(attention.scale, attention.sliding_window, attention.softcap)
    fixed, others = fixed_and_candidates(length, attributes, dense.device)
    at = others.nonzero().squeeze(-1)
    always = float(dense[:, fixed].sum())
    budgets = [min(len(at), attended_budget(length, 0, permille)) for permille in PERMILLES]
    norms = per_query_head(torch.linalg.vector_norm(attention.values[:, at], dim=-1), attention.query)
    for planes in sorted({candidate.planes for candidate in tried}):
        mine = [candidate for candidate in tried if candidate.planes == planes]
        # The tables of a smaller L are the first ones of a larger L: draw_planes fills them in that order.
        most = max(candidate.tables for candidate in mine)
        drawn = torch.from_numpy(draw_planes(most, planes, attention.query.shape[-1], socket.seed)).to(dense)
        codes = per_query_head(key_codes(attention.keys[:, at], drawn).transpose(1, 2), attention.query)
        for temperature in sorted({candidate.temperature for candidate in mine}):
            table = bucket_probabilities(attention.query, drawn, temperature)
            collisions, first = torch.zeros_like(norms), 0
            for candidate in sorted(c for c in mine if c.temperature == temperature):
                span = slice(first, candidate.tables)
                collisions = collisions + table[:, span].gather(-1, codes[:, span]).sum(1)
                first = candidate.tables
                yield candidate, always + _kept(collisions * norms, dense[:, at], budgets, socket, attention)


def _kept(scores: Tensor, dense: Tensor, budgets: Sequence[int], socket: SocketConfig, attention: Attention) -> Floats:
    """Mass of the best scored tokens, as many as each budget has, summed over heads."""
    if socket.selection == Selection.kv_head:
        group = len(scores) // len(attention.keys)
        scores = scores.reshape(-1, group, scores.shape[1]).sum(1).repeat_interleave(group, 0)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kept = torch.nn.functional.pad(dense.gather(1, order).cumsum(1), (1, 0)).sum(0).double()
    return kept[torch.tensor(budgets, device=kept.device)].cpu().numpy()


def _in_float32(attention: Attention) -> Attention:
    return dataclasses.replace(
        attention, query=attention.query.float(), keys=attention.keys.float(), values=attention.values.float()
    )


def feed_all(
    model: PreTrainedModel, group: Group, observe: Callable[[int, Attention], None], advance: Callable[[int], None]
) -> None:
    """Decode the queries of a group's prompts with dense attention, telling `observe` of each."""
    dense = Choice(Dense(), Share(1.0, 0, 1))
    with chosen_attention(model):
        for batch in _of_one_shape(group):
            split = len(batch[0].tokens) - batch[0].decoded
            decoder = Decoder(model, [prompt.tokens[:split] for prompt in batch], dense)
            decoder.observe = observe
            rest = np.stack([prompt.tokens[split:] for prompt in batch])
            decoder.feed(torch.from_numpy(rest).long().to(model.device))
            advance(len(batch))


def _of_one_shape(group: Group) -> Iterator[list[Prompt]]:
    shapes: dict[tuple[int, int], list[Prompt]] = defaultdict(list)
    for prompt in group.prompts:
        shapes[len(prompt.tokens), prompt.decoded].append(prompt)
    for prompts in shapes.values():
        for first in range(0, len(prompts), BATCH):
            yield prompts[first : first + BATCH]


def mass_kept(
    model: PreTrainedModel, groups: Sequence[Group], socket: SocketConfig, progress: Progress
) -> dict[str, float]:
    """The mean share of attention mass that `socket` keeps, by group: by the operator's own rule, not from curves."""
    method = socket_method(socket)
    found: dict[str, list[float]] = defaultdict(list)
    total = sum(len(group.prompts) for group in groups)
    with progress.task(f"Checking on {total} other prompts", total) as advance:
        for group in groups:

            def observe(_: int, attention: Attention, name: str = group.name) -> None:
                attributes = socket.attributes(attention.scale, attention.sliding_window, attention.softcap)
                found[name].append(measure(_in_float32(attention), method, attributes).mass)

            feed_all(model, group, observe, advance)
    return {name: float(np.mean(values)) for name, values in found.items()}


class Answering:
    """Groups of samples, prefilled once and answered once with dense attention, to be answered with any setting."""

    def __init__(self, model: PreTrainedModel, groups: Sequence[Group], progress: Progress) -> None:
        self._model, self._progress = model, progress
        self._parts: list[tuple[str, Decoder, tuple[Sample, ...]]] = []
        dense = Choice(Dense(), Share(1.0, 0, 1))
        with chosen_attention(model):
            for group in groups:
                for first in range(0, len(group.samples), BATCH):
                    samples = group.samples[first : first + BATCH]
                    decoder = Decoder(model, [sample.context for sample in samples], dense)
                    self._parts.append((group.name, decoder, samples))
        self._dense = self._right(dense)

    def kept(self, socket: SocketConfig) -> dict[str, float]:
        """Task accuracy with `socket`, as a share of dense attention's, by group."""

        def attributes(_: int, attention: Attention) -> OperatorAttributes:
            return socket.attributes(attention.scale, attention.sliding_window, attention.softcap)

        right = self._right(Choice(socket_method(socket), attributes))
        return {name: right[name] / whole if whole else 1.0 for name, whole in self._dense.items()}

    def _right(self, choice: Choice) -> dict[str, float]:
        """Sum of the samples' scores by group."""
        total = sum(len(samples) for _, _, samples in self._parts)
        right: dict[str, float] = defaultdict(float)
        with chosen_attention(self._model), self._progress.task(f"Answering {total} samples", total) as advance:
            for name, decoder, samples in self._parts:
                decoder.choice = choice
                for sample, answers in zip(samples, decoder.answer(samples), strict=True):
                    right[name] += np.mean(
                        [score(turn, said) for turn, said in zip(sample.turns, answers, strict=True)]
                    )
                advance(len(samples))
        return {name: float(value) for name, value in right.items()}


def socket_method(socket: SocketConfig) -> Socket:
    return Socket(
        tables=socket.tables,
        planes=socket.planes,
        temperature=socket.temperature,
        selection=socket.selection,
        seed=socket.seed,
    )
