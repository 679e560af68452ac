"""What a method is: a score for every cached token; the operator's own rule makes the attended set of the scores.

So all methods attend to the same sink, the same window and the same number of chosen tokens, and differ only in which.

Shapes: Hq query heads, Hkv KV heads, T cached tokens, the current one last, D head size.  Sequences of the same length may be
stacked in the heads: [B * Hq, D] beside [B * Hkv, T, D].
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from socket_trt.config import OperatorAttributes
from socket_trt.reference import decode_set
from socket_trt.reference.selection import visible


class Method(ABC):
    """Chooses what a decode query attends to.

    name   as tables show it
    draws  its answers depend on a seed
    """

    name: str
    draws: bool = False

    def bits_per_token(self, head_size: int) -> int:
        """Bits that a KV head keeps of a token besides its key and value, to choose by."""
        return 0

    @abstractmethod
    def scores(self, query: Tensor, keys: Tensor, values: Tensor, attributes: OperatorAttributes) -> Tensor:
        """How much each token is wanted: [Hq, T].

        query [Hq, D]; keys, values [Hkv, T, D].  What a real cache would keep of keys and values (codes, page bounds)
        is computed from them here.
        """

    def attended(self, query: Tensor, keys: Tensor, values: Tensor, attributes: OperatorAttributes) -> Tensor:
        """The attended set: bool [Hq, T]: sink, window, and the best scores within the budget.

        Ties go to the lower position.
        """
        length = keys.shape[1]
        if length <= attributes.min_length:
            seen = visible(length - 1, 1, attributes.sliding_window, query.device)
            return seen.expand(query.shape[0], -1)
        return decode_set(self.scores(query, keys, values, attributes), attributes)


def per_query_head(keys: Tensor, query: Tensor) -> Tensor:
    """[Hkv, ...] repeated to [Hq, ...]: what each query head's KV head has."""
    return keys.repeat_interleave(query.shape[0] // keys.shape[0], 0)
