"""A Hugging Face causal LM run on packed tokens and a paged cache, its attention replaced by SOCKET.

The replacement goes through transformers' attention interface: `socket_attention_forward` is registered as the
implementation "socket", which also tells transformers to build no mask.  What the operator needs besides query, key and
value travels in `PackedStep`, a keyword argument that transformers hands down to every attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

import socket_trt.ops  # noqa: F401  (registers torch.ops.socket_trt.attention)
from socket_trt.config import OperatorAttributes, SocketConfig
from socket_trt.planes import draw_planes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "socket"

LayerCaches = tuple[Tensor, Tensor, Tensor, Tensor]  # key, value, code, norm
# Told of every operator call: layer, inputs in order, attributes.
Observer = Callable[[int, tuple[Tensor, ...], OperatorAttributes], None]


@dataclasses.dataclass
class PackedStep:
    """One step's shared operator inputs, the caches of all layers, and where each layer leaves its new caches."""

    config: SocketConfig
    planes: Tensor
    page_table: Tensor
    past_length: Tensor
    query_start: Tensor
    caches: list[LayerCaches]
    presents: dict[int, LayerCaches] = dataclasses.field(default_factory=dict)
    observe: Observer | None = None


def socket_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    socket_step: PackedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [1, Hq, N, D], key and value [1, Hkv, N, D] to [1, N, Hq, D]."""
    assert attention_mask is None, "an unknown attention implementation gets no mask from transformers"
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # an int, in every family's attention
    attributes = socket_step.config.attributes(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window=sliding_window or -1,
        softcap=softcap or 0.0,
    )
    inputs = (
        query,
        key,
        value,
        *socket_step.caches[layer],
        socket_step.page_table,
        socket_step.past_length,
        socket_step.query_start,
        socket_step.planes,
    )
    if socket_step.observe is not None:
        socket_step.observe(layer, inputs, attributes)
    output, *present = torch.ops.socket_trt.attention(*inputs, *attributes.as_dict().values())
    socket_step.presents[layer] = tuple(present)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, socket_attention_forward)


class PackedModel(nn.Module):
    """Signature of the exported graph: six step inputs and the caches in, logits and the caches out."""

    planes: Tensor

    def __init__(self, model: PreTrainedModel, config: SocketConfig, head_size: int) -> None:
        super().__init__()
        model.set_attn_implementation(IMPLEMENTATION)
        self.model = model
        self.config = config
        self.observe: Observer | None = None
        planes = draw_planes(config.tables, config.planes, head_size, config.seed)
        self.register_buffer("planes", torch.from_numpy(planes).to(model.dtype), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        logits_indices: Tensor,
        page_table: Tensor,
        past_length: Tensor,
        query_start: Tensor,
        caches: list[LayerCaches],
    ) -> tuple[Tensor, list[LayerCaches]]:
        """Shapes as in `socket_trt.runtime.session.StepBatch`; logits float32 [B, V]."""
        step = PackedStep(self.config, self.planes, page_table, past_length, query_start, caches, observe=self.observe)
        result = self.model(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            use_cache=False,
            logits_to_keep=logits_indices.long(),
            socket_step=step,
        )
        return result.logits[0].float(), [step.presents[layer] for layer in range(len(caches))]


def freeze_rope(model: PreTrainedModel, max_seq_len: int) -> None:
    """Fix the rotary frequencies of `longrope` to what a sequence of `max_seq_len` tokens needs.

    transformers chooses them by the longest position in the batch, so that one request would change another's answer;
    an engine chooses once, by the longest sequence it can hold.
    """
    rotary = model.base_model.rotary_emb
    if getattr(rotary, "rope_type", None) != "longrope":
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, rotary.attention_scaling = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, seq_len=max_seq_len)
    rotary.inv_freq = frequencies
    rotary.rope_type = "default"


def empty_caches(
    layers: int, pages: int, kv_heads: int, head_size: int, config: SocketConfig, dtype: torch.dtype
) -> list[LayerCaches]:
    """Zeroed caches of a pool of `pages` pages, for every layer."""
    size = config.page_size
    return [
        (
            torch.zeros(pages, kv_heads, size, head_size, dtype=dtype),
            torch.zeros(pages, kv_heads, size, head_size, dtype=dtype),
            torch.zeros(pages, kv_heads, config.tables, config.code_words, dtype=torch.int32),
            torch.zeros(pages, kv_heads, size, dtype=dtype),
        )
        for _ in range(layers)
    ]
