"""SOCKET, as the reference defines it; `value_norms=False` leaves the norm of the value out of the score."""

from __future__ import annotations

import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes, Selection
from socket_trt.planes import draw_planes
from socket_trt.quality.methods.base import Method
from socket_trt.reference import collision_scores, key_codes


class Socket(Method):
    """The temperature is the method's own: the attributes' one is not looked at."""

    draws = True

    def __init__(
        self,
        *,
        tables: int = 60,
        planes: int = 8,
        temperature: float = 0.3,
        selection: Selection = Selection.query_head,
        value_norms: bool = True,
        seed: int = 0,
    ) -> None:
        self.tables, self.planes, self.temperature = tables, planes, temperature
        self.selection, self.value_norms, self.seed = selection, value_norms, seed
        kind = ", by KV head" if selection == Selection.kv_head else ""
        self.name = f"SOCKET {tables}x{planes}{kind}{'' if value_norms else ', no norms'}"

    def bits_per_token(self, head_size: int) -> int:
        return self.tables * self.planes

    def scores(self, query: Tensor, keys: Tensor, values: Tensor, attributes: OperatorAttributes) -> Tensor:
        drawn = draw_planes(self.tables, self.planes, query.shape[-1], self.seed)
        planes = torch.from_numpy(drawn).to(query)
        codes = key_codes(keys, planes).transpose(1, 2)
        norms = torch.linalg.vector_norm(values, dim=-1)
        if not self.value_norms:
            norms = torch.ones_like(norms)
        return collision_scores(query, codes, norms, planes, self.temperature, self.selection)
