"""What a method keeps of a decode query's dense attention."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes, SocketConfig
from socket_trt.errors import ConfigError
from socket_trt.quality.methods.base import Method, per_query_head
from socket_trt.reference import attend, decode_set
from socket_trt.reference.selection import fixed_and_candidates


@dataclasses.dataclass(frozen=True)
class Attention:
    """One decode query of one layer, and all it could attend to.

    query [Hq, D]; keys, values [Hkv, T, D], the current token last.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    sliding_window: int = -1
    softcap: float = 0.0


@dataclasses.dataclass(frozen=True)
class Share:
    """A budget: ceil(length * kept) tokens are attended to, the first `sink` and the last `window` among them."""

    kept: float
    sink: int
    window: int

    def __call__(self, length: int, attention: Attention) -> OperatorAttributes:
        """Attributes at a length.  Raises ConfigError where sink and window alone are more than is kept."""
        total = math.ceil(round(length * self.kept, 6))
        chosen = total - self.sink - self.window
        if chosen < 0:
            raise ConfigError(
                f"{self.kept:.1%} of {length} tokens are {total}, fewer than sink and window ({self.sink} + {self.window}):"
                " keep more, take a longer length, or shorten sink and window"
            )
        config = SocketConfig.create(
            sink=self.sink, window=self.window, budget_tokens=chosen, budget_permille=0, min_length=0
        )
        return config.attributes(attention.scale, attention.sliding_window, attention.softcap)


@dataclasses.dataclass(frozen=True)
class Kept:
    """Means over the query heads.

    mass    share of the attention weights, of all tokens, that lies on the attended ones
    recall  share of the true best candidates, as many as the budget has, that were chosen (1 where it has none)
    error   norm of (output - dense output) over norm of dense output
    """

    mass: float
    recall: float
    error: float


def weights(attention: Attention) -> Tensor:
    """The dense attention weights: [Hq, T], each row summing to one over the tokens that can be seen."""
    a = attention
    scores = torch.einsum("hd,htd->ht", a.query, per_query_head(a.keys, a.query)) * a.scale
    if a.softcap > 0:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    length = scores.shape[-1]
    if a.sliding_window > 0:
        scores[:, : max(0, length - a.sliding_window)] = float("-inf")
    return scores.softmax(-1)


def measure(attention: Attention, method: Method, attributes: OperatorAttributes) -> Kept:
    """How near `method` comes to dense attention.  Shapes as in `Attention`; computed in the dtype of its tensors."""
    a = attention
    dense = weights(a)
    seen = dense > 0
    attended = method.attended(a.query, a.keys, a.values, attributes)
    output, whole = (
        attend(a.query[:, None], a.keys, a.values, mask[:, None], a.scale, a.softcap)[:, 0] for mask in (attended, seen)
    )
    error = torch.linalg.vector_norm(output - whole, dim=-1) / torch.linalg.vector_norm(whole, dim=-1)
    fixed, _ = fixed_and_candidates(dense.shape[-1], attributes, dense.device)
    best = decode_set(dense, attributes) & ~fixed
    recall = (attended & best).sum(-1) / best.sum(-1) if best.any() else torch.ones(1)
    return Kept(
        mass=(dense * attended).sum(-1).mean().item(), recall=recall.float().mean().item(), error=error.mean().item()
    )
