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

# Nuclei are small: how many of the largest weights are looked at first, and how fast that number grows.
_FIRST_NUCLEUS = 256
_NUCLEUS_GROWTH = 8

_Indices = npt.NDArray[np.intp]
_Weights = npt.NDArray[np.float64]


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
    candidates = _largest(logits, parameters.top_k or len(logits))
    with np.errstate(over="ignore"):  # a temperature next to 0: all but the best become -inf
        weights = np.exp((logits[candidates].astype(np.float64) - float(logits[best])) / parameters.temperature)
    if parameters.top_p < 1:
        kept = _nucleus(weights, parameters.top_p)
        candidates, weights = candidates[kept], weights[kept]
    cumulative = np.cumsum(weights)
    chosen = np.searchsorted(cumulative, _uniform(seed, index) * cumulative[-1], side="right")
    return int(candidates[chosen])


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1): the first of the stream that the counter-based generator has for the key (seed, index)."""
    key = np.array([seed, index], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _largest(values: FloatArray | _Weights, count: int) -> _Indices:
    """Indices, rising, of the `count` largest values (ties: the lower index), in linear time."""
    if count >= len(values):
        return np.arange(len(values))
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > threshold)
    level = np.flatnonzero(values == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, level]))


def _nucleus(weights: _Weights, top_p: float) -> _Indices:
    """Indices, rising, of the fewest largest weights (ties: the lower index) that sum to `top_p` of all at least."""
    target = top_p * weights.sum()
    size = _FIRST_NUCLEUS
    while True:
        largest = _largest(weights, size)
        order = largest[np.argsort(-weights[largest], kind="stable")]
        cumulative = np.cumsum(weights[order])
        if cumulative[-1] >= target or size >= len(weights):
            return np.sort(order[: np.searchsorted(cumulative, target) + 1])
        size *= _NUCLEUS_GROWTH


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(fits: bool, name: str, value: object, expected: str) -> None:
    if not fits:
        raise RequestError(f"{name} is {value!r}: expected {expected}")
