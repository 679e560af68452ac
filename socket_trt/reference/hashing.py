"""Key codes and query bucket probabilities (paper, section 3: soft LSH).

Shapes: L tables, R planes a table, D head size; `...` is any leading shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def key_codes(keys: Tensor, planes: Tensor) -> Tensor:
    """Bucket of every key in every table.

    keys   [..., D], floating point
    planes [L, R, D], same dtype
    Returns int64 [..., L] in [0, 2^R): bit r is [w[l,r] . k >= 0], the first plane is the most significant bit.
    """
    rank = planes.shape[1]
    bits = torch.einsum("...d,lrd->...lr", keys, planes) >= 0
    weights = 2 ** torch.arange(rank - 1, -1, -1, device=keys.device)
    codes: Tensor = (bits * weights).sum(-1)
    return codes


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes as the cache holds them: 32 / bits consecutive tokens in one little-endian int32 word.

    codes int64 [..., page_size] in [0, 2^bits); bits 8 or 16.  Returns int32 [..., page_size * bits / 32].
    """
    per_word = 32 // bits
    shifts = bits * torch.arange(per_word, device=codes.device)
    words = (codes.reshape(*codes.shape[:-1], -1, per_word) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`: int32 [..., words] to int64 [..., words * 32 / bits]."""
    shifts = bits * torch.arange(32 // bits, device=words.device)
    codes: Tensor = (words.long().unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1)


def bucket_probabilities(query: Tensor, planes: Tensor, temperature: float) -> Tensor:
    """Probability that a query gives each bucket of each table.

    query [..., D], planes [L, R, D].  Returns [..., L, 2^R], each table summing to one.

    The paper's softmax over the 2^R corners s of a hypercube, softmax_s( s . u / tau ) with
    u = tanh(W q) / sqrt(D), factors over the planes into prod_r sigmoid(2 s_r u_r / tau).  The product is built one
    plane at a time, each doubling the table: bit 0 first, so that the first plane ends as the most significant bit.
    """
    u = torch.tanh(torch.einsum("...d,lrd->...lr", query, planes)) / math.sqrt(query.shape[-1])
    logits = 2 * u / temperature
    table = torch.ones(*logits.shape[:-1], 1, dtype=query.dtype, device=query.device)
    for r in range(planes.shape[1]):
        one = torch.sigmoid(logits[..., r, None])
        zero = torch.sigmoid(-logits[..., r, None])
        table = torch.stack((table * zero, table * one), dim=-1).flatten(-2)
    return table
