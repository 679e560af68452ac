"""Which tokens an operator attends to, seen from outside through its outputs alone.

With scale 0 every attended token weighs the same, and selection does not change: scores come from codes and cached value
norms.  With one-hot values, component d of the output is then positive exactly when the token whose value is the d-th
unit vector was attended to; D tokens show in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from socket_trt.config import OperatorAttributes, code_bits

Arrays = dict[str, npt.NDArray[Any]]
Run = Callable[[Arrays], npt.NDArray[Any]]


def decode_rows(inputs: Arrays) -> list[int]:
    """Rows with one token in the step."""
    counts = np.diff(inputs["query_start"])
    return [int(row) for row in np.flatnonzero(counts == 1)]


def attended_tokens(run: Run, inputs: Arrays, row: int) -> npt.NDArray[np.bool_]:
    """Bool [Hq, T]: the tokens that each head of decode row `row` attends to.

    run: the operator with its scale attribute set to 0, from inputs (`names.OPERATOR_INPUTS`) to its output
    [1, Hq, N, D].  inputs: as the operator was given them; the row is taken out and run alone.
    """
    token = int(inputs["query_start"][row])
    past = int(inputs["past_length"][row])
    page_size, head_size = inputs["value_cache"].shape[2:]
    alone = inputs | {
        **{name: inputs[name][:, :, token : token + 1] for name in ("query", "key", "value")},
        "page_table": inputs["page_table"][row : row + 1],
        "past_length": inputs["past_length"][row : row + 1],
        "query_start": np.array([0, 1], np.int32),
    }
    pages = inputs["page_table"][row]
    seen = []
    for first in range(0, past + 1, head_size):
        values = np.zeros_like(inputs["value_cache"])
        for component, position in enumerate(range(first, min(first + head_size, past))):
            values[pages[position // page_size], :, position % page_size, component] = 1
        current = np.zeros_like(alone["value"])
        if first <= past < first + head_size:
            current[..., past - first] = 1
        output = run(alone | {"value_cache": values, "value": current})
        seen.append(output[0, :, 0] > 0)
    tokens: npt.NDArray[np.bool_] = np.concatenate(seen, axis=1)[:, : past + 1]
    return tokens


def attention_over(
    chosen: npt.NDArray[np.bool_], inputs: Arrays, outputs: Arrays, row: int, attributes: OperatorAttributes
) -> npt.NDArray[np.float64]:
    """Exact attention of decode row `row` over the `chosen` tokens [Hq, T], float64 [Hq, D].

    inputs, outputs: the operator's; keys and values are read from the caches after the step.
    """
    length = chosen.shape[1]
    page_size = inputs["key_cache"].shape[2]
    position = np.arange(length)
    pages, slots = inputs["page_table"][row][position // page_size], position % page_size
    group = len(chosen) // inputs["key"].shape[1]
    keys, values = (
        outputs[name][pages, :, slots].astype(np.float64).repeat(group, axis=1)  # [T, Hq, D]
        for name in ("key_cache_out", "value_cache_out")
    )
    query = inputs["query"][0, :, int(inputs["query_start"][row])].astype(np.float64)
    logits = np.einsum("hd,thd->ht", query, keys) * attributes.scale
    if attributes.softcap:
        logits = np.tanh(logits / attributes.softcap) * attributes.softcap
    logits = np.where(chosen, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended: npt.NDArray[np.float64] = np.einsum("ht,thd->hd", weights, values)
    return attended


def cache_slots(inputs: Arrays) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Page and slot of each token of the step, int64 [tokens] each, and how many tokens there are."""
    start, past, table = inputs["query_start"], inputs["past_length"], inputs["page_table"]
    page_size = inputs["key_cache"].shape[2]
    rows = np.repeat(np.arange(len(past)), np.diff(start))
    position = past[rows] + np.arange(start[-1]) - start[rows]
    pages: npt.NDArray[np.int64] = table[rows, position // page_size].astype(np.int64)
    return pages, (position % page_size).astype(np.int64), int(start[-1])


def written_codes(code_cache: npt.NDArray[np.int32], inputs: Arrays) -> npt.NDArray[np.int64]:
    """Codes that the step wrote, int64 [tokens, Hkv, L], read out of the code cache after it."""
    bits = code_bits(inputs["planes"].shape[1])
    per_word = 32 // bits
    pages, slot, _ = cache_slots(inputs)
    words = code_cache[pages, :, :, slot // per_word].astype(np.int64)
    codes: npt.NDArray[np.int64] = (words >> (bits * (slot % per_word))[:, None, None]) & (2**bits - 1)
    return codes
