"""An attention as the patterns find it: everything that `SocketAttention` needs to take its place."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import onnx_ir as ir

from socket_trt.onnx.rewrite.mask import MaskReader


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary embedding that the attention node itself applies.

    cos, sin     [max_positions, r / 2]: the first r of a head's D entries are rotated
    interleaved  pairs are (0, 1), (2, 3), ... instead of (0, r / 2), (1, r / 2 + 1), ...
    """

    cos: ir.Value
    sin: ir.Value
    interleaved: bool


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention node with its real keys and values: of Hkv heads, and without the past.

    query, key, value   [B, H, S, D] if `heads_first`, else [B, S, H * D]; key and value are None where `query` holds
                        all three behind one another
    sliding_window      -1: none; softcap 0: none
    past                graph inputs that bring in the cache, none if the graph has no cache
    presents            values that carry the cache out of the graph
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value | None
    value: ir.Value | None
    heads_first: bool
    query_heads: int
    kv_heads: int
    head_size: int
    dtype: ir.DataType
    scale: float
    sliding_window: int
    softcap: float
    rotary: Rotary | None
    past: tuple[ir.Value, ...]
    presents: tuple[ir.Value, ...]


class AttentionPattern(ABC):
    """One form of attention node, matched on domain and operator."""

    domain: str
    op_type: str

    @abstractmethod
    def match(self, node: ir.Node, masks: MaskReader) -> Attention:
        """What the node computes.  Raises MismatchError with the reason if it is not causal attention on a cache."""
