"""Export a Llama or Mistral checkpoint: the plain case, and every step of it.

    python export/llama_mistral.py CHECKPOINT model.onnx --max-seq-len 32768

CHECKPOINT is a directory as Hugging Face saves it (config.json, safetensors).  Nothing of it is copied: the graph names
the safetensors files that hold its weights.  `socket-trt build` does the same and adds manifest and tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer

from socket_trt.config import SocketConfig
from socket_trt.models.checkpoint import load_config
from socket_trt.onnx.export import attention_nodes, export_model, save_graph
from socket_trt.onnx.weights import attach_weights
from socket_trt.weights import index_checkpoint


def main(
    checkpoint: Path,
    output: Path,
    max_seq_len: int = 8192,
    budget_permille: int = 50,
    min_length: int = 0,
    opset: int = 18,
) -> None:
    config = load_config(checkpoint)
    if config.model_type not in ("llama", "mistral"):
        raise SystemExit(f"{checkpoint} is a {config.model_type}; this script exports Llama and Mistral")

    # 1. The graph, from the configuration alone: attention becomes SocketAttention on packed tokens and a paged cache.
    # `socket-trt build` attends densely up to 32K tokens, where that is as fast; this selects from the start.
    socket = SocketConfig(budget_permille=budget_permille, min_length=min_length)
    model = export_model(config, socket, torch.float16, max_seq_len, opset)

    # 2. The weights: every initializer is pointed at its bytes in the checkpoint.
    weights = attach_weights(model, index_checkpoint(checkpoint), config.tie_word_embeddings)

    # 3. The file, with the operator's body for runtimes that do not know it.
    save_graph(model, output)

    # Mistral's sliding window has become an attribute of the operator; Llama has none (-1).
    windows = {node.attributes["sliding_window"].as_int() for node in attention_nodes(model)}
    files = {location.file for location in weights.values()}
    print(f"{output}: {len(attention_nodes(model))} SocketAttention nodes, sliding window {windows}")
    print(f"{len(weights)} weights in {len(files)} files of {checkpoint}")


if __name__ == "__main__":
    typer.run(main)
