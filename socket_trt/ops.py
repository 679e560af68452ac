"""The operator as a PyTorch custom operator, `torch.ops.socket_trt.attention`.

On the CPU, and for float32, it is the reference; on CUDA tensors of 16 bits it is the native library.  Export sees one
node.  Arguments are the operator's inputs in order and its attributes in `OperatorAttributes`' order; outputs are new
tensors, the inputs are left as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes
from socket_trt.names import OPERATOR_INPUTS
from socket_trt.native import native_attention
from socket_trt.reference import socket_attention


@torch.library.custom_op("socket_trt::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor,
    page_table: Tensor,
    past_length: Tensor,
    query_start: Tensor,
    planes: Tensor,
    scale: float,
    temperature: float,
    sink: int,
    window: int,
    budget_tokens: int,
    budget_permille: int,
    min_length: int,
    selection: int,
    page_size: int,
    sliding_window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`socket_trt.reference.socket_attention`, which documents shapes and dtypes."""
    attributes = OperatorAttributes(
        scale,
        temperature,
        sink,
        window,
        budget_tokens,
        budget_permille,
        min_length,
        selection,
        page_size,
        sliding_window,
        softcap,
    )
    outputs = socket_attention(
        query,
        key,
        value,
        key_cache,
        value_cache,
        code_cache,
        norm_cache,
        page_table,
        past_length,
        query_start,
        planes,
        attributes,
    )
    # A custom operator returns a plain tuple.
    return outputs.output, outputs.key_cache, outputs.value_cache, outputs.code_cache, outputs.norm_cache


@attention.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs: Any = dict(zip(OPERATOR_INPUTS, arguments, strict=False))
    attributes = OperatorAttributes(*arguments[len(OPERATOR_INPUTS) :])
    if inputs["query"].dtype == torch.float32:
        return tuple(socket_attention(**inputs, attributes=attributes))
    return native_attention(**inputs, attributes=attributes)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(query), *(torch.empty_like(cache) for cache in rest[:4])
