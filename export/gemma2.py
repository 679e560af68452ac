"""Export a Gemma2 checkpoint, whose layers alternate between a sliding window and the whole text.

    python export/gemma2.py CHECKPOINT model.onnx

Scale (query_pre_attn_scalar), softcap and the windows of every second layer become attributes of the operator.  The
script also shows how to treat layers differently: a layer that sees no more than its window has little to gain from
selection, so --dense-local attends densely there by raising min_length in those nodes alone.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
import typer

from socket_trt.config import INT32_MAX, SocketConfig
from socket_trt.models.checkpoint import load_config
from socket_trt.onnx.export import attention_nodes, export_model, save_graph
from socket_trt.onnx.weights import attach_weights
from socket_trt.weights import index_checkpoint


def main(checkpoint: Path, output: Path, max_seq_len: int = 8192, dense_local: bool = True) -> None:
    config = load_config(checkpoint)
    if config.model_type != "gemma2":
        raise SystemExit(f"{checkpoint} is a {config.model_type}; this script exports Gemma2")
    socket = SocketConfig(min_length=0)  # the default, dense up to 32K tokens, is more than Gemma2 takes
    model = export_model(config, socket, torch.float16, min(max_seq_len, config.max_position_embeddings))
    attach_weights(model, index_checkpoint(checkpoint), config.tie_word_embeddings)

    for layer, node in enumerate(attention_nodes(model)):
        window = node.attributes["sliding_window"].as_int()
        if dense_local and window > 0:
            node.attributes["min_length"] = ir.AttrInt64("min_length", INT32_MAX)
        sees = f"the last {window} tokens" if window > 0 else "everything"
        dense = node.attributes["min_length"].as_int() == INT32_MAX
        print(f"layer {layer}: sees {sees}, {'dense' if dense else 'selects'}")
    save_graph(model, output)


if __name__ == "__main__":
    typer.run(main)
