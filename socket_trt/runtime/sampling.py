"""From a row of logits to a token: greedy, temperature, top-k and top-p, reproducible token by token."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from socket_trt.errors import RequestError
from socket_trt.runtime.session import FloatArray

MAX_SEED = 2**64 - 1

# Sums over a vocabulary are taken by blocks, so that only one block needs its running sums.
_BLOCK = 512
# So many values are sorted at once; more are halved first.
_SORTED_AT_ONCE = 4096

_Indices = npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True)
class SamplingParameters:
    """What a request asks for.

    max_tokens      tokens to generate at most
    temperature     logits are divided by it; 0: greedy, the largest logit (ties: the lower token id)
    top_k           only the k largest logits (ties: the lower token id); 0: all
    top_p           of those, the fewest whose probabilities sum to top_p at least; 1: all
    seed            of the random stream, 0 ... 2**64 - 1; None: another one for each request
    stop            text that ends the generation and is not part of it
    stop_token_ids  tokens that end the generation, besides the model's own
    ignore_eos      the model's own stop tokens do not end the generation

    A single stop string, and any sequences, are accepted for `stop` and `stop_token_ids`.
    Raises RequestError, one line, for a value of the wrong type or out of its range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(_is_integer(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _check(_is_integer(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "over 0 and at most 1")
        seed_fits = self.seed is None or (_is_integer(self.seed) and 0 <= self.seed <= MAX_SEED)
        _check(seed_fits, "seed", self.seed, f"an integer from 0 to {MAX_SEED}")
        _check(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "true or false")

        stop: Any = self.stop
        stop = (stop,) if isinstance(stop, str) else stop
        stop_fits = isinstance(stop, (list, tuple)) and all(isinstance(text, str) and text for text in stop)
        _check(stop_fits, "stop", self.stop, "strings, none of them empty")
        ids: Any = self.stop_token_ids
        ids_fit = isinstance(ids, (list, tuple)) and all(_is_integer(token) and token >= 0 for token in ids)
        _check(ids_fit, "stop_token_ids", ids, "token ids, 0 or more")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))


def sample(logits: FloatArray, parameters: SamplingParameters, seed: int, index: int) -> int:
    """The token that follows.

    logits  float32 [V]; -inf excludes a token
    seed    of the random stream: `parameters.seed`, or what stands for it where that is None
    index   how many tokens the request has generated before

    The random number depends on (seed, index) alone, so that neither the rest of the batch nor a preemption changes
    what a request is given.
    Raises FloatingPointError where the largest logit is no finite number.
    """
    best = int(np.argmax(logits))  # a NaN counts as the largest
    if not np.isfinite(logits[best]):
        raise FloatingPointError(f"the model's logits are not finite: token {best} has {logits[best]}")
    if parameters.temperature == 0:
        return best
    tokens, weights = weigh(logits, parameters)
    position = _choose(weights, _uniform(seed, index))
    return position if tokens is None else int(tokens[position])


def weigh(logits: FloatArray, parameters: SamplingParameters) -> tuple[_Indices | None, FloatArray]:
    """Token ids, rising, and their probabilities but for their sum (float32, the largest 1; 0: not admitted).

    Token ids None: those of all logits.  Of equal probabilities, as float32, the nucleus takes the lower token id first.
    `parameters.temperature` is not 0.
    """
    tokens = None
    if 0 < parameters.top_k < len(logits):
        tokens = _largest(logits, parameters.top_k)
        logits = logits[tokens]
    scale = np.float32(min(1 / parameters.temperature, np.finfo(np.float32).max))
    with np.errstate(over="ignore"):  # a temperature next to 0: all but the best become -inf
        weights: FloatArray = logits - logits.max()
        weights *= scale
    np.exp(weights, out=weights)
    if parameters.top_p < 1:
        _leave_nucleus(weights, parameters.top_p)
    return tokens, weights


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1): the first of the stream that the counter-based generator has for the key (seed, index)."""
    key = np.array([seed, index], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _largest(values: FloatArray, count: int) -> _Indices:
    """Indices, rising, of the `count` largest values (ties: the lower index), in linear time; `count` < len(values)."""
    # The largest of each of `count` blocks or more: as many values reach the `count`-th of those.
    size = len(values) // (4 * count) or 1
    tops = np.maximum.reduceat(values, np.arange(0, len(values), size))
    reaching = np.flatnonzero(values >= np.partition(tops, len(tops) - count)[len(tops) - count])
    near = values[reaching]
    level = np.partition(near, len(near) - count)[len(near) - count]
    kept = near > level
    kept[np.flatnonzero(near == level)[: count - np.count_nonzero(kept)]] = True
    largest: _Indices = reaching[kept]
    return largest


def _leave_nucleus(weights: FloatArray, top_p: float) -> None:
    """Set to 0 all but the fewest largest weights (ties: the lower index) that sum to `top_p` of all at least.

    Those are found by halving: a pivot, and on which side of it the sum is reached.
    """
    total = float(weights.sum(dtype=np.float64))
    missing = top_p * total
    # All below this, taken together, are less than half of what may be left out.
    rest = np.compress(weights >= (1 - top_p) * total / (2 * len(weights)), weights)
    while len(rest) > _SORTED_AT_ONCE:
        sample = np.sort(rest[:: len(rest) // 64])
        larger = rest > sample[len(sample) // 2]
        above = np.compress(larger, rest)
        mass = float(above.sum(dtype=np.float64))
        if mass < missing:
            above = np.compress(~larger, rest)
            missing -= mass
        if len(above) == len(rest):
            break  # more equal values than are sorted at once
        rest = above
    falling = np.sort(rest)[::-1]
    last = min(int(np.searchsorted(np.cumsum(falling, dtype=np.float64), missing)), len(falling) - 1)
    level = falling[last]
    room = last + 1 - int(np.count_nonzero(falling > level))
    equal = np.flatnonzero(weights == level)
    weights *= weights >= level
    weights[equal[room:]] = 0


def _choose(weights: FloatArray, uniform: float) -> int:
    """The index at which the running sum of the weights passes `uniform`, in [0, 1), of their sum."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))
    target = uniform * sums[-1]
    # Where rounding has let the target reach the sum: the last index that is not excluded.
    block = int(min(np.searchsorted(sums, target, side="right"), np.searchsorted(sums, sums[-1])))
    before = sums[block - 1] if block else 0.0
    within = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    position = min(np.searchsorted(within, target - before, side="right"), np.searchsorted(within, within[-1]))
    return block * _BLOCK + int(position)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(fits: bool, name: str, value: object, expected: str) -> None:
    if not fits:
        raise RequestError(f"{name} is {value!r}: expected {expected}")
