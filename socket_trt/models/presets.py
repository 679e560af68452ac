"""Models known by name: their hub ids and the configurations that build their graphs without a download.

A configuration is what the model's config.json says, as far as it shapes the graph.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from socket_trt.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model by name.  `hub_id` is None for `tiny`, which the project makes itself."""

    hub_id: str | None
    config: dict[str, Any]


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _decoder(
    model_type: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **extra: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        **extra,
    }


def _llama2(*shape: int) -> dict[str, Any]:
    return _decoder(
        "llama",
        *shape,
        vocab_size=32000,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )


def _llama3(*shape: int, **extra: Any) -> dict[str, Any]:
    defaults = {
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
    return _decoder("llama", *shape, **defaults | extra)


def _llama31(*shape: int, factor: float = 8.0, **extra: Any) -> dict[str, Any]:
    return _llama3(*shape, max_position_embeddings=131072, rope_scaling=_LLAMA3_ROPE | {"factor": factor}, **extra)


def _qwen2(*shape: int, vocab: int = 152064, eps: float = 1e-6, tied: bool = False) -> dict[str, Any]:
    return _decoder(
        "qwen2",
        *shape,
        vocab_size=vocab,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
        use_sliding_window=False,
        bos_token_id=151643,
        eos_token_id=151643,
    )


def _qwen3(*shape: int, tied: bool = False) -> dict[str, Any]:
    return _decoder(
        "qwen3",
        *shape,
        vocab_size=151936,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        attention_bias=False,
        use_sliding_window=False,
        bos_token_id=151643,
        eos_token_id=151645,
    )


def _mistral(*shape: int, sliding_window: int | None, **extra: Any) -> dict[str, Any]:
    defaults = {
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": sliding_window,
    }
    return _decoder("mistral", *shape, **defaults | extra)


def _gemma2(*shape: int, head_dim: int, query_pre_attn_scalar: int) -> dict[str, Any]:
    return _decoder(
        "gemma2",
        *shape,
        vocab_size=256000,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        sliding_window=4096,
        query_pre_attn_scalar=query_pre_attn_scalar,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )


def _phi3(*shape: int, **extra: Any) -> dict[str, Any]:
    defaults = {
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    }
    return _decoder("phi3", *shape, **defaults | extra)


TINY = "tiny"

PRESETS: dict[str, Preset] = {
    # Made by socket_trt.models.tiny: random, deterministic, with a byte-level tokenizer.
    TINY: Preset(
        None,
        _decoder(
            "llama",
            2,
            128,
            256,
            4,
            2,
            head_dim=64,
            vocab_size=260,
            max_position_embeddings=8192,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            initializer_range=0.08,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
        ),
    ),
    "llama2-7b": Preset("meta-llama/Llama-2-7b-hf", _llama2(32, 4096, 11008, 32, 32)),
    "llama2-13b": Preset("meta-llama/Llama-2-13b-hf", _llama2(40, 5120, 13824, 40, 40)),
    "llama2-70b": Preset("meta-llama/Llama-2-70b-hf", _llama2(80, 8192, 28672, 64, 8)),
    "llama3-8b": Preset("meta-llama/Meta-Llama-3-8B", _llama3(32, 4096, 14336, 32, 8)),
    "llama3-70b": Preset("meta-llama/Meta-Llama-3-70B", _llama3(80, 8192, 28672, 64, 8)),
    "llama3.1-8b": Preset("meta-llama/Llama-3.1-8B", _llama31(32, 4096, 14336, 32, 8)),
    "llama3.1-70b": Preset("meta-llama/Llama-3.1-70B", _llama31(80, 8192, 28672, 64, 8)),
    "llama3.2-1b": Preset(
        "meta-llama/Llama-3.2-1B",
        _llama31(16, 2048, 8192, 32, 8, factor=32.0, head_dim=64, tie_word_embeddings=True),
    ),
    "llama3.2-3b": Preset(
        "meta-llama/Llama-3.2-3B",
        _llama31(28, 3072, 8192, 24, 8, factor=32.0, head_dim=128, tie_word_embeddings=True),
    ),
    "qwen2-7b": Preset("Qwen/Qwen2-7B", _qwen2(28, 3584, 18944, 28, 4)),
    "qwen2.5-0.5b": Preset("Qwen/Qwen2.5-0.5B", _qwen2(24, 896, 4864, 14, 2, vocab=151936, tied=True)),
    "qwen2.5-1.5b": Preset("Qwen/Qwen2.5-1.5B", _qwen2(28, 1536, 8960, 12, 2, vocab=151936, tied=True)),
    "qwen2.5-3b": Preset("Qwen/Qwen2.5-3B", _qwen2(36, 2048, 11008, 16, 2, vocab=151936, tied=True)),
    "qwen2.5-7b": Preset("Qwen/Qwen2.5-7B", _qwen2(28, 3584, 18944, 28, 4)),
    "qwen2.5-14b": Preset("Qwen/Qwen2.5-14B", _qwen2(48, 5120, 13824, 40, 8, eps=1e-5)),
    "qwen2.5-32b": Preset("Qwen/Qwen2.5-32B", _qwen2(64, 5120, 27648, 40, 8, eps=1e-5)),
    "qwen2.5-72b": Preset("Qwen/Qwen2.5-72B", _qwen2(80, 8192, 29568, 64, 8, eps=1e-5)),
    "qwen3-0.6b": Preset("Qwen/Qwen3-0.6B", _qwen3(28, 1024, 3072, 16, 8, tied=True)),
    "qwen3-1.7b": Preset("Qwen/Qwen3-1.7B", _qwen3(28, 2048, 6144, 16, 8, tied=True)),
    "qwen3-4b": Preset("Qwen/Qwen3-4B", _qwen3(36, 2560, 9728, 32, 8, tied=True)),
    "qwen3-8b": Preset("Qwen/Qwen3-8B", _qwen3(36, 4096, 12288, 32, 8)),
    "qwen3-14b": Preset("Qwen/Qwen3-14B", _qwen3(40, 5120, 17408, 40, 8)),
    "qwen3-32b": Preset("Qwen/Qwen3-32B", _qwen3(64, 5120, 25600, 64, 8)),
    "mistral-7b": Preset("mistralai/Mistral-7B-v0.1", _mistral(32, 4096, 14336, 32, 8, sliding_window=4096)),
    "mistral-7b-v0.3": Preset(
        "mistralai/Mistral-7B-v0.3",
        _mistral(32, 4096, 14336, 32, 8, sliding_window=None, vocab_size=32768, rope_theta=1000000.0),
    ),
    "mistral-nemo-12b": Preset(
        "mistralai/Mistral-Nemo-Base-2407",
        _mistral(
            40,
            5120,
            14336,
            32,
            8,
            sliding_window=None,
            head_dim=128,
            vocab_size=131072,
            rope_theta=1000000.0,
            max_position_embeddings=128000,
        ),
    ),
    "phi3-mini-4k": Preset("microsoft/Phi-3-mini-4k-instruct", _phi3(32, 3072, 8192, 32, 32, sliding_window=2047)),
    "phi3-medium-4k": Preset("microsoft/Phi-3-medium-4k-instruct", _phi3(40, 5120, 17920, 40, 10, sliding_window=2047)),
    "gemma2-2b": Preset("google/gemma-2-2b", _gemma2(26, 2304, 9216, 8, 4, head_dim=256, query_pre_attn_scalar=256)),
    "gemma2-9b": Preset("google/gemma-2-9b", _gemma2(42, 3584, 14336, 16, 8, head_dim=256, query_pre_attn_scalar=256)),
    "gemma2-27b": Preset(
        "google/gemma-2-27b", _gemma2(46, 4608, 36864, 32, 16, head_dim=128, query_pre_attn_scalar=144)
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of exactly this name.  Raises ModelError that lists the nearest names."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name.lower(), PRESETS, n=4, cutoff=0.3) or list(PRESETS)
    raise ModelError(
        f"unknown model '{name}': no preset of that name (nearest: {', '.join(near)}), "
        "no local directory, and not a hub id of the form owner/name"
    )
