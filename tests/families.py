"""Tiny random checkpoints of every family, as transformers would save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from socket_trt.models.random_checkpoint import random_tensor
from socket_trt.models.tiny import write_tokenizer

_SHAPE = {
    "vocab_size": 260,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.08,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}

# What each family has that another has not is in its configuration here.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "head_dim": 32, "rope_theta": 500000.0},
    "llama3.2": {
        "model_type": "llama",
        "head_dim": 32,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": 40},
    "phi3": {"model_type": "phi3", "original_max_position_embeddings": 1024, "sliding_window": 100},
    "phi3-longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.01 * i for i in range(12)],
            "long_factor": [1.0 + 0.5 * i for i in range(12)],
        },
    },
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 32,
        "sliding_window": 40,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
}


# Head sizes that the CUDA kernels have: 64 instead of 24 and 32.
GPU_CHANGES: dict[str, dict[str, Any]] = {
    name: {"hidden_size": 256, "intermediate_size": 320} | ({"head_dim": 64} if "head_dim" in config else {})
    for name, config in CONFIGS.items()
}
GPU_CHANGES["gemma2"]["query_pre_attn_scalar"] = 48
GPU_CHANGES["phi3-longrope"]["rope_scaling"] = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(32)],
    "long_factor": [1.0 + 0.5 * i for i in range(32)],
}


def save_checkpoint(
    name: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A checkpoint of `CONFIGS[name]` with `changes`, and a tokenizer; `options` go to save_pretrained."""
    config = AutoConfig.for_model(**_SHAPE | CONFIGS[name] | (changes or {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Biases and norms away from 0 and 1, so that leaving one out shows.
            mean = 0.0 if config.model_type == "gemma2" else 1.0
            parameter.copy_(random_tensor(parameter_name, tuple(parameter.shape), 0.08, mean, seed=1))
    model.to(dtype).save_pretrained(directory, **options)
    write_tokenizer(directory)
    return directory
