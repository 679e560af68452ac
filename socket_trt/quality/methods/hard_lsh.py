"""Hard LSH: the number of tables in which a key lies in the query's own bucket, each bucket of 2^R corners."""

from __future__ import annotations

import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes
from socket_trt.planes import draw_planes
from socket_trt.quality.methods.base import Method, per_query_head
from socket_trt.reference import key_codes


class HardLsh(Method):
    """`tables` and `planes` as SOCKET's: the same bits a token where their product is the same."""

    draws = True

    def __init__(self, *, tables: int = 60, planes: int = 8, value_norms: bool = False, seed: int = 0) -> None:
        self.tables, self.planes, self.value_norms, self.seed = tables, planes, value_norms, seed
        self.name = f"hard LSH {tables}x{planes}{', norms' if value_norms else ''}"

    def bits_per_token(self, head_size: int) -> int:
        return self.tables * self.planes

    def scores(self, query: Tensor, keys: Tensor, values: Tensor, attributes: OperatorAttributes) -> Tensor:
        planes = torch.from_numpy(draw_planes(self.tables, self.planes, query.shape[-1], self.seed)).to(query)
        codes = per_query_head(key_codes(keys, planes), query)  # [Hq, T, L]
        collisions = (codes == key_codes(query, planes)[:, None]).sum(-1).to(query.dtype)
        if self.value_norms:
            collisions = collisions * per_query_head(torch.linalg.vector_norm(values, dim=-1), query)
        return collisions
