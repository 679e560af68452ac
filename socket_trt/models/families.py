"""The architectures that export covers, and what their configurations must say for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from socket_trt.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Hugging Face model type -> family as people know it.
FAMILIES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "phi3": "Phi-3",
    "gemma2": "Gemma2",
}

# RoPE variants whose frequencies do not depend on the batch at hand once the longest sequence is known.
ROPE_TYPES = {"default", "linear", "llama3", "yarn", "longrope"}


def check_supported(config: PretrainedConfig, where: str) -> str:
    """The family of a configuration.  Raises ModelError where export does not cover it."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"{where}: architecture '{config.model_type}' is not supported; supported are "
            + ", ".join(f"{name} ({kind})" for kind, name in FAMILIES.items())
        )
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ModelError(
            f"{where}: rope scaling '{rope_type}' is not supported, because its frequencies change with the batch; "
            f"supported are {', '.join(sorted(ROPE_TYPES))}"
        )
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{where}: quantised checkpoints are not supported; give the float16 or bfloat16 original")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ModelError(
            f"{where}: {config.num_attention_heads} query heads do not divide into {config.num_key_value_heads} KV heads"
        )
    return family


def head_size(config: PretrainedConfig) -> int:
    """D."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
