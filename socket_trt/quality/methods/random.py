"""Tokens at random, for each query head and length its own: what any method must beat."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes
from socket_trt.quality.methods.base import Method


class Random(Method):
    name = "random"
    draws = True

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, query: Tensor, keys: Tensor, values: Tensor, attributes: OperatorAttributes) -> Tensor:
        length = keys.shape[1]
        drawn = np.random.Generator(np.random.PCG64([self.seed, length])).random((query.shape[0], length))
        return torch.from_numpy(drawn).to(query)
