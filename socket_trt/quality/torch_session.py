"""A session that runs the Hugging Face model in PyTorch with `torch.ops.socket_trt.attention` in it.

On CUDA tensors of 16 bits that operator is the native library, so this is the library under a whole model without TensorRT;
elsewhere it is the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from socket_trt import names
from socket_trt.config import SocketConfig
from socket_trt.models.families import head_size
from socket_trt.models.packed import PackedModel, empty_caches
from socket_trt.runtime.session import FloatArray, Session, SessionLimits, StepBatch, full_pool

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchSession(Session):
    """Takes the model over: its attention implementation is the operator from here on."""

    def __init__(self, model: PreTrainedModel, socket: SocketConfig, max_seq_len: int, max_batch_size: int) -> None:
        config, device = model.config, model.device
        self._limits = SessionLimits(
            vocabulary_size=config.vocab_size,
            page_size=socket.page_size,
            num_pages=full_pool(max_batch_size, max_seq_len, socket.page_size),
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
        )
        size = head_size(config)
        self._model = PackedModel(model, socket, size).to(device)
        caches = empty_caches(
            config.num_hidden_layers, self._limits.num_pages, config.num_key_value_heads, size, socket, model.dtype
        )
        self._caches = [tuple(tensor.to(device) for tensor in layer) for layer in caches]

    @property
    def limits(self) -> SessionLimits:
        return self._limits

    def step(self, batch: StepBatch) -> FloatArray:
        device = self._model.planes.device
        inputs = [torch.from_numpy(getattr(batch, name)).to(device) for name in names.STEP_INPUTS]
        with torch.no_grad():
            logits, self._caches = self._model(*inputs, self._caches)
        found: FloatArray = logits.cpu().numpy()
        return found
