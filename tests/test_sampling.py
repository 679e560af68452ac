from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socket_trt.errors import RequestError
from socket_trt.runtime.sampling import SamplingParameters, sample, weigh

HYPOTHESIS = settings(max_examples=150, derandomize=True, deadline=None)


def random_logits(size: int, seed: int = 0, levels: int | None = None) -> np.ndarray:
    """float32 logits; with `levels`, only so many distinct values, so that ties abound."""
    rng = np.random.default_rng(seed)
    if levels:
        return rng.integers(0, levels, size).astype(np.float32)
    return rng.standard_normal(size).astype(np.float32) * 2


def expected_distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The definition, with a full sort: softmax over the top k, then over the nucleus of that."""
    order = np.lexsort((np.arange(len(logits)), -logits))[: top_k or len(logits)]
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    kept = [i for i in range(len(order)) if p[:i].sum() < top_p]
    distribution = np.zeros(len(logits))
    distribution[order[kept]] = p[kept] / p[kept].sum()
    return distribution


def draw(logits: np.ndarray, parameters: SamplingParameters, count: int) -> np.ndarray:
    """Frequencies of the tokens of `count` draws."""
    tokens = [sample(logits, parameters, 11, index) for index in range(count)]
    return np.bincount(tokens, minlength=len(logits)) / count


def test_greedy_takes_the_largest_and_of_ties_the_lower_id() -> None:
    assert sample(np.array([0, 3, 1, 3], np.float32), SamplingParameters(), 0, 0) == 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.7), (1.5, 8, 0.6), (1.0, 1, 1.0), (1.0, 0, 1e-9)],
)
@pytest.mark.parametrize("levels", [None, 3])
def test_frequencies_are_those_of_the_definition(
    temperature: float, top_k: int, top_p: float, levels: int | None
) -> None:
    logits = random_logits(16, seed=5, levels=levels)
    expected = expected_distribution(logits, temperature, top_k, top_p)
    found = draw(logits, SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p), 4000)
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / 4000))


@HYPOTHESIS
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 5000),
    levels=st.sampled_from([None, 2, 50]),
    top_k=st.one_of(st.just(0), st.integers(1, 6000)),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    index=st.integers(0, 2**40),
)
def test_a_token_is_always_one_that_the_definition_admits(
    seed: int, size: int, levels: int | None, top_k: int, top_p: float, index: int
) -> None:
    logits = random_logits(size, seed, levels)
    parameters = SamplingParameters(temperature=1.0, top_k=top_k, top_p=top_p)
    token = sample(logits, parameters, seed, index)
    # Where rounding decides whether one more token belongs to the nucleus, either answer is right.
    assert expected_distribution(logits, 1.0, top_k, min(1.0, top_p * (1 + 1e-9)))[token] > 0


def kept_by_sorting(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> list[int]:
    """Token ids that a full sort of float32 probabilities admits."""
    order = np.lexsort((np.arange(len(logits)), -logits))[: top_k or len(logits)]
    weights = np.exp((logits[order] - logits.max()) * np.float32(1 / temperature)).astype(np.float64)
    order, weights = order[by := np.lexsort((order, -weights))], weights[by]
    reached = np.searchsorted(np.cumsum(weights), top_p * weights.sum()) + 1 if top_p < 1 else len(order)
    return sorted(order[:reached][weights[:reached] > 0].tolist())


@HYPOTHESIS
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 7, 511, 512, 513, 5000, 20000]),
    levels=st.sampled_from([None, 1, 2, 3, 50]),
    temperature=st.sampled_from([0.01, 0.3, 1.0, 50.0]),
    top_k=st.sampled_from([0, 1, 2, 50, 511, 512, 4999, 10**6]),
    top_p=st.sampled_from([1.0, 1 - 1e-9, 0.999, 0.9, 0.5, 0.1, 1e-9]),
    excluded=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_admitted_tokens_are_those_of_a_full_sort(
    seed: int, size: int, levels: int | None, temperature: float, top_k: int, top_p: float, excluded: float
) -> None:
    logits = random_logits(size, seed, levels)
    logits[np.random.default_rng(seed).random(size) < excluded] = -np.inf
    logits[seed % size] = 1.0  # one is left
    parameters = SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, weights = weigh(logits, parameters)
    admitted = (np.arange(size) if tokens is None else tokens)[weights > 0].tolist()
    assert admitted == kept_by_sorting(logits, temperature, top_k, top_p)


def test_most_of_a_large_flat_vocabulary_is_a_nucleus() -> None:
    """Larger than what is sorted at once, with ties and without."""
    for levels in (None, 2, 40):
        logits = random_logits(100_000, 3, levels)
        parameters = SamplingParameters(temperature=20.0, top_p=0.97)
        _, weights = weigh(logits, parameters)
        expected = kept_by_sorting(logits, 20.0, 0, 0.97)
        assert np.flatnonzero(weights).tolist() == expected
        assert len(expected) > 90_000


@pytest.mark.parametrize("size", [1, 3, 511, 512, 513, 1025])
def test_a_draw_is_the_first_whose_running_sum_passes_it(size: int) -> None:
    logits = random_logits(size, seed=9)
    logits[size // 2 :: 3] = -np.inf
    logits[0] = 0.0
    weights = np.exp(logits.astype(np.float64) - logits.max())
    running = np.cumsum(weights)
    parameters = SamplingParameters(temperature=1.0)
    for index in range(200):
        uniform = np.random.Generator(np.random.Philox(key=np.array([4, index], np.uint64))).random()
        expected = int(np.searchsorted(running, uniform * running[-1], side="right"))
        found = sample(logits, parameters, 4, index)
        # Rounding to float32 may move a draw across a boundary that it lies on.
        assert found == expected or abs(running[min(found, expected)] - uniform * running[-1]) < 1e-5 * running[-1]
        assert weights[found] > 0


def test_a_nucleus_larger_than_the_first_look_is_found() -> None:
    logits = np.zeros(4096, np.float32)  # uniform: the nucleus of 0.75 is the first 3072 tokens
    tokens = [sample(logits, SamplingParameters(temperature=1.0, top_p=0.75), 3, index) for index in range(400)]
    assert max(tokens) < 3072
    assert max(tokens) > 2900


def test_the_stream_depends_on_seed_and_index_alone() -> None:
    logits = random_logits(1000)
    parameters = SamplingParameters(temperature=5.0)
    forwards = [sample(logits, parameters, 42, index) for index in range(50)]
    backwards = [sample(logits, parameters, 42, index) for index in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) > 30
    other_seed = [sample(logits, parameters, 43, index) for index in range(50)]
    assert sum(a == b for a, b in zip(forwards, other_seed, strict=True)) < 5
    shifted = zip(forwards[1:], other_seed[:-1], strict=True)
    assert sum(a == b for a, b in shifted) < 5, "neighbouring seeds must not be one stream, shifted"


def test_the_stream_stays_the_same_from_release_to_release() -> None:
    logits = random_logits(1000)
    parameters = SamplingParameters(temperature=5.0)
    assert [sample(logits, parameters, 2**64 - 1, index) for index in (0, 1, 2, 10**9)] == [228, 647, 458, 38]


def test_excluded_tokens_are_never_drawn() -> None:
    logits = np.full(8, -np.inf, np.float32)
    logits[[2, 5]] = 0
    assert {sample(logits, SamplingParameters(temperature=1.0), 0, index) for index in range(50)} == {2, 5}


@pytest.mark.filterwarnings("error")
def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_logits(100)
    assert sample(logits, SamplingParameters(temperature=5e-324), 0, 0) == int(logits.argmax())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits = random_logits(10)
    logits[4] = bad
    with pytest.raises(FloatingPointError, match="token 4"):
        sample(logits, SamplingParameters(temperature=temperature), 0, 0)
    with pytest.raises(FloatingPointError):
        sample(np.full(4, -np.inf, np.float32), SamplingParameters(temperature=temperature), 0, 0)


@pytest.mark.parametrize(
    ("top_k", "top_p", "sorted_at_most"), [(50, 1.0, 50), (50, 0.9, 256), (0, 0.9, 4096), (0, 1.0, 0)]
)
def test_a_large_vocabulary_is_not_sorted(
    monkeypatch: pytest.MonkeyPatch, top_k: int, top_p: float, sorted_at_most: int
) -> None:
    sizes = [0]
    for name in ("sort", "argsort"):
        original = getattr(np, name)

        def measured(array: np.ndarray, *args: Any, original: Any = original, **kwargs: Any) -> np.ndarray:
            sizes.append(len(array))
            return original(array, *args, **kwargs)

        monkeypatch.setattr(np, name, measured)
    logits = random_logits(131072)
    sample(logits, SamplingParameters(temperature=0.5, top_k=top_k, top_p=top_p), 0, 0)
    assert max(sizes) <= sorted_at_most


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1, 1.5, True, None]),
        ("temperature", [-0.1, float("nan"), float("inf"), "1", None, True]),
        ("top_k", [-1, 2.0, None, False]),
        ("top_p", [0, -1, 1.01, float("nan"), None]),
        ("seed", [-1, 2**64, 0.5, True, "7"]),
        ("stop", [("",), ("a", ""), (1,), 5, None]),
        ("stop_token_ids", [(-1,), (1.5,), ("a",), 3, "12", (True,)]),
        ("ignore_eos", [0, "no", None]),
    ],
)
def test_bad_values_are_errors_of_one_line(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RequestError) as caught:
            SamplingParameters(**{field: value})
        message = str(caught.value)
        assert message.startswith(f"{field} is {value!r}: expected ")
        assert "\n" not in message


def test_lists_and_single_stop_strings_are_accepted() -> None:
    parameters = SamplingParameters(stop="END", stop_token_ids=[3, 4])  # type: ignore[arg-type]
    assert parameters == SamplingParameters(stop=("END",), stop_token_ids=(3, 4))
    assert hash(parameters) == hash(SamplingParameters(stop=("END",), stop_token_ids=(3, 4)))
