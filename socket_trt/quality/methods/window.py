"""Sink and window only: the budget goes to the tokens before the window."""

from __future__ import annotations

import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes
from socket_trt.quality.methods.base import Method


class SinkWindow(Method):
    name = "sink + window"

    def scores(self, query: Tensor, keys: Tensor, values: Tensor, attributes: OperatorAttributes) -> Tensor:
        positions = torch.arange(keys.shape[1], dtype=query.dtype, device=query.device)
        return positions.expand(query.shape[0], -1)
