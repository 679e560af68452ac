"""Export a Qwen2, Qwen2.5 or Qwen3 checkpoint, with the paper's finer codes (L = 60 tables of R = 10 planes).

    python export/qwen.py CHECKPOINT model.onnx

Qwen2 adds biases to its projections and Qwen3 normalises queries and keys per head; both happen before RoPE, and
SOCKET's codes are taken after it, so neither needs a word here.  R = 10 makes codes of 16 bits: twice the code bytes of
R = 8 for a sharper score, which pays where few tokens are kept.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer

from socket_trt.config import SocketConfig
from socket_trt.models.checkpoint import load_config
from socket_trt.onnx.export import export_model, save_graph
from socket_trt.onnx.weights import attach_weights
from socket_trt.weights import index_checkpoint


def main(checkpoint: Path, output: Path, max_seq_len: int = 8192) -> None:
    config = load_config(checkpoint)
    if config.model_type not in ("qwen2", "qwen3"):
        raise SystemExit(f"{checkpoint} is a {config.model_type}; this script exports Qwen2, Qwen2.5 and Qwen3")
    socket = SocketConfig(tables=60, planes=10, temperature=0.4, sink=128, window=128, budget_permille=50, min_length=0)
    model = export_model(config, socket, torch.float16, max_seq_len)
    attach_weights(model, index_checkpoint(checkpoint), config.tie_word_embeddings)
    save_graph(model, output)

    size = socket.page_size
    codes = socket.tables * socket.code_words * 4
    keys_and_values = 2 * size * config.head_dim * 2 if hasattr(config, "head_dim") else None
    print(f"{output}: {socket.code_bits}-bit codes, {codes} bytes a page and KV head")
    if keys_and_values is not None:
        print(f"keys and values take {keys_and_values}: the codes add {codes / keys_and_values:.0%}")


if __name__ == "__main__":
    typer.run(main)
