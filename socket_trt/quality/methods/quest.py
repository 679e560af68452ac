"""Quest (Tang et al., 2024): whole pages, by an upper bound of their keys' scores.

A page keeps the least and the greatest of its keys in each dimension; sum_d max(q_d least_d, q_d greatest_d) bounds every
score in it.  Pages are taken in the order of that bound; to be compared at equal tokens, the last one only in part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes
from socket_trt.quality.methods.base import Method, per_query_head

KEY_BITS = 16  # of a number in the cache


class Quest(Method):
    """`page_size` tokens a page (16 in the paper)."""

    def __init__(self, *, page_size: int = 16) -> None:
        self.page_size = page_size
        self.name = f"Quest, pages of {page_size}"

    def bits_per_token(self, head_size: int) -> int:
        return 2 * head_size * KEY_BITS // self.page_size

    def scores(self, query: Tensor, keys: Tensor, values: Tensor, attributes: OperatorAttributes) -> Tensor:
        length, size = keys.shape[1], self.page_size
        missing = -length % size
        # The last token again fills the last page up: it changes neither its least nor its greatest.
        padded = torch.cat([keys, keys[:, -1:].expand(-1, missing, -1)], 1)
        pages = padded.reshape(len(keys), -1, size, keys.shape[-1])
        least, greatest = (per_query_head(bound, query) for bound in (pages.amin(2), pages.amax(2)))
        q = query[:, None]
        bound = torch.maximum(q * least, q * greatest).sum(-1)
        return bound.repeat_interleave(size, 1)[:, :length]
