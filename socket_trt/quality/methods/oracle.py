"""Exact top-k: the tokens of the largest attention weights.  It reads every key, so it saves nothing; none keeps more mass."""

from __future__ import annotations

import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes
from socket_trt.quality.methods.base import Method, per_query_head


class ExactTopK(Method):
    name = "exact top-k"

    def scores(self, query: Tensor, keys: Tensor, values: Tensor, attributes: OperatorAttributes) -> Tensor:
        return torch.einsum("hd,htd->ht", query, per_query_head(keys, query))
