"""Device functions that the attention kernels share, and what a kernel tells the compiler about itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile-time values of one binary: constants of the kernel, warps, and depth of the load pipeline."""

    constants: dict[str, Any]
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to call a kernel: `name` is what the launcher asks for.

    `configs` are tried in order; the first whose shared memory fits the architecture is taken.
    """

    name: str
    configs: tuple[Config, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Triton function with the types of its run-time arguments, in order ("T" is the tensors' dtype)."""

    function: Any
    signature: dict[str, str]
    variants: Callable[[int, int], Iterable[Variant]]  # (architecture, head size)


@triton.jit
def capped(x, softcap):
    """Cap scores: softcap * tanh(x / softcap), as softcap * (1 - 2 / (exp(2 x / softcap) + 1))."""
    return softcap * (1 - 2 / (tl.exp2(x * (2 * LOG2_E / softcap)) + 1))


@triton.jit
def page_of(page_table, position, row, pages, pages_per_sequence, page_shift):
    """Page that holds a position of a sequence; the null page where the table holds nonsense."""
    page = tl.load(page_table + row.to(tl.int64) * pages_per_sequence + (position >> page_shift))
    return tl.where((page >= 0) & (page < pages), page, 0)


@triton.jit
def accumulate(weights, values, sums, maximum, scores):
    """One step of online softmax: `scores` of new tokens (base 2) with their `values` join the running sums."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen no token yet has maximum -inf: its factor must be 0, not NaN.
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    factor = tl.exp2(maximum - base)
    probabilities = tl.exp2(scores - base[:, None])
    weights = weights * factor + tl.sum(probabilities, 1)
    sums = tl.dot(probabilities.to(values.dtype), values, sums * factor[:, None])
    return weights, sums, new_maximum
