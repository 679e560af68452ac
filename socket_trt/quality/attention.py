"""A Hugging Face causal LM whose decode queries attend to what a `Method` chooses, through transformers' own cache.

It is the engine's rule on the reference semantics: a step of several tokens attends densely, a step of one chooses.
Sequences of the same length are batched; no padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from socket_trt.config import OperatorAttributes
from socket_trt.quality.measures import Attention
from socket_trt.quality.methods.base import Method
from socket_trt.quality.tasks import Sample
from socket_trt.quality.vocabulary import Tokens
from socket_trt.reference import attend
from socket_trt.reference.selection import visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "socket_quality"

# Told of every decode query: layer, attention (sequences stacked in its heads).
Observer = Callable[[int, Attention], None]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How decode queries choose: by a method, and as many tokens as the attributes at a length say."""

    method: Method
    attributes: Callable[[int, Attention], OperatorAttributes]


def quality_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    choice: Choice,
    observe: Observer | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [B, Hq, n, D], key and value [B, Hkv, T, D] to [B, n, Hq, D]."""
    assert attention_mask is None, "an unknown attention implementation gets no mask from transformers"
    tokens, size = query.shape[2:]
    scale = size**-0.5 if scaling is None else float(scaling)
    past = key.shape[2] - tokens
    window, cap = sliding_window or -1, softcap or 0.0
    if tokens > 1 and past == 0 and window < 0 and cap == 0:
        # Keys of each query head: with enable_gqa, float32 on a GPU would build the whole matrix of weights.
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return output.transpose(1, 2).contiguous(), None
    q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))  # sequences stacked in the heads
    if tokens > 1:
        mask = visible(past, tokens, window, q.device).expand(len(q), -1, -1)
    else:
        attention = Attention(q[:, 0], k, v, scale, window, cap)
        if observe is not None:
            observe(int(module.layer_idx), attention)  # type: ignore[arg-type]  # set by transformers on every attention module
        mask = choice.method.attended(q[:, 0], k, v, choice.attributes(past + 1, attention))[:, None]
    output = attend(q, k, v, mask, scale, cap).reshape(query.shape)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, quality_attention_forward)


@contextmanager
def chosen_attention(model: PreTrainedModel) -> Iterator[None]:
    """While open, `model`'s attention is `quality_attention_forward`."""
    stock = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(stock)


class Decoder:
    """A batch of prefilled contexts that can be decoded again and again, each time as another `Choice` says."""

    def __init__(self, model: PreTrainedModel, contexts: Sequence[Tokens], choice: Choice) -> None:
        """Prefill: contexts of one length, more than a token.  `choice` may be replaced; prefill does not look at it."""
        self.choice = choice
        self.observe: Observer | None = None
        self._model = model
        self._cache = DynamicCache()  # of whole sequences: a sliding window is the attended set's business
        self._device = model.device
        self._prefilled = len(contexts[0])
        self._step(_stack(contexts, self._device))

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._cache.get_seq_length())

    def rewind(self, length: int | None = None) -> None:
        """Forget what was decoded, all of it or from `length` on."""
        surplus = self.length - (self._prefilled if length is None else length)
        if surplus > 0:
            self._cache.crop(-surplus)

    def answer(self, samples: Sequence[Sample]) -> list[list[list[int]]]:
        """Decode the turns of the samples whose contexts were prefilled: tokens generated, by sample and turn.

        Each turn follows the right answers of the earlier ones, as in `evaluate`.
        """
        generated = []
        self.rewind()
        last = len(samples[0].turns) - 1
        for number, turns in enumerate(zip(*(sample.turns for sample in samples), strict=True)):
            logits = self.feed(_stack([turn.question for turn in turns], self._device))
            asked = self.length
            generated.append(self.generate(logits, len(turns[0].answer)).tolist())
            self.rewind(asked)
            if number < last:
                self.feed(_stack([turn.answer for turn in turns], self._device))
        return [list(turns) for turns in zip(*generated, strict=True)]

    def feed(self, tokens: Tensor) -> Tensor:
        """Decode given tokens, int64 [B, n], one after another.  Returns the last one's logits [B, V]."""
        for position in range(tokens.shape[1]):
            logits = self._step(tokens[:, position : position + 1])
        return logits

    def generate(self, logits: Tensor, count: int) -> Tensor:
        """`count` tokens greedily, from the logits before the first: int64 [B, count]."""
        tokens = [logits.argmax(-1, keepdim=True)]
        while len(tokens) < count:
            tokens.append(self._step(tokens[-1]).argmax(-1, keepdim=True))
        return torch.cat(tokens, 1)

    def _step(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            result = self._model(
                tokens,
                None,
                None,
                self._cache,  # by position: transformers 5.24 renamed `past_key_values`
                use_cache=True,
                logits_to_keep=1,
                choice=self.choice,
                observe=self.observe,
            )
        logits: Tensor = result.logits[:, -1].float()
        return logits


def _stack(rows: Sequence[Tokens], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(rows)).long().to(device)
