"""Scores of the cached tokens and the set of tokens that a query attends to (paper, section 4).

Shapes: Hq query heads, Hkv KV heads, T tokens of one sequence, n query tokens of this step, L tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes, Selection, attended_budget
from socket_trt.reference.hashing import bucket_probabilities


def collision_scores(
    query: Tensor, codes: Tensor, norms: Tensor, planes: Tensor, temperature: float, selection: int
) -> Tensor:
    """score(q, k, v) = ||v|| * sum_l p_l(code_l(k)) of one decode query per head.

    query [Hq, D]; codes int64 [Hkv, L, T]; norms [Hkv, T]; planes [L, R, D].
    Returns [Hq, T].  With `Selection.kv_head` the query heads of a KV head share the sum of their scores.
    """
    group = query.shape[0] // codes.shape[0]
    table = bucket_probabilities(query, planes, temperature)
    collisions = table.gather(-1, codes.repeat_interleave(group, 0)).sum(-2)
    scores = collisions * norms.repeat_interleave(group, 0)
    if selection == Selection.kv_head:
        shared = scores.reshape(-1, group, scores.shape[-1]).sum(1)
        scores = shared.repeat_interleave(group, 0)
    return scores


def visible(past: int, tokens: int, sliding_window: int, device: torch.device) -> Tensor:
    """Tokens that causality and the sliding window let each query see: bool [tokens, past + tokens]."""
    position = torch.arange(past, past + tokens, device=device)[:, None]
    distance = position - torch.arange(past + tokens, device=device)
    seen = distance >= 0
    return seen & (distance < sliding_window) if sliding_window > 0 else seen


def fixed_and_candidates(length: int, attributes: OperatorAttributes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens that a decode query attends to whatever their score, and those it chooses among: bool [T] each."""
    position = torch.arange(length, device=device)
    seen = visible(length - 1, 1, attributes.sliding_window, device)[0]
    fixed = seen & ((position < attributes.sink) | (position >= length - attributes.window))
    return fixed, seen & ~fixed


def decode_set(scores: Tensor, attributes: OperatorAttributes) -> Tensor:
    """The attended set of a decode query: sink, window, and the M best scores among the tokens between them.

    scores [Hq, T] of all T cached tokens, the current one included.  Returns bool [Hq, T].
    Ties go to the lower position; every token counts once, whichever rule admits it.
    """
    heads, length = scores.shape
    fixed, others = fixed_and_candidates(length, attributes, scores.device)
    candidates = others.nonzero().squeeze(-1)
    budget = attended_budget(length, attributes.budget_tokens, attributes.budget_permille)
    order = scores[:, candidates].sort(dim=-1, descending=True, stable=True).indices
    chosen = candidates[order[:, :budget]]
    return fixed.repeat(heads, 1).scatter(1, chosen, True)


def attended_set(
    query: Tensor, codes: Tensor, norms: Tensor, planes: Tensor, past: int, attributes: OperatorAttributes
) -> Tensor:
    """Which of a sequence's T = past + n tokens each of its n query tokens attends to, by head.

    query [Hq, n, D]; codes int64 [Hkv, L, T]; norms [Hkv, T]; planes [L, R, D].  Returns bool [Hq, n, T].
    One token in the step is a decode query and selects; several are a prefill chunk and attend densely.
    """
    heads, tokens, _ = query.shape
    if tokens > 1 or past + tokens <= attributes.min_length:
        return visible(past, tokens, attributes.sliding_window, query.device).expand(heads, -1, -1)
    scores = collision_scores(query[:, 0], codes, norms, planes, attributes.temperature, attributes.selection)
    return decode_set(scores, attributes)[:, None]
