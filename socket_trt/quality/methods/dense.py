"""Everything is attended to."""

from __future__ import annotations

import torch
from torch import Tensor

from socket_trt.config import INT32_MAX, OperatorAttributes
from socket_trt.quality.methods.base import Method


class Dense(Method):
    name = "dense"

    def scores(self, query: Tensor, keys: Tensor, values: Tensor, attributes: OperatorAttributes) -> Tensor:
        return torch.zeros(query.shape[0], keys.shape[1], dtype=query.dtype, device=query.device)

    def attended(self, query: Tensor, keys: Tensor, values: Tensor, attributes: OperatorAttributes) -> Tensor:
        return super().attended(query, keys, values, attributes.replace(min_length=INT32_MAX))
