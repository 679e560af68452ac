"""Export a Phi-3 checkpoint, whose long variants scale RoPE by the length of the text.

    python export/phi3.py CHECKPOINT model.onnx --max-seq-len 65536

Phi-3's `longrope` has two sets of rotary frequencies, one for texts up to its original context and one for longer ones.
PyTorch's model switches by the longest text in the batch, which would let one request change another's answer; an
exported graph has one set, chosen by --max-seq-len.  Query, key and value come from one fused projection and gate and up
from another; the graph splits them as the model does.
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


def main(checkpoint: Path, output: Path, max_seq_len: int = 4096) -> None:
    config = load_config(checkpoint)
    if config.model_type != "phi3":
        raise SystemExit(f"{checkpoint} is a {config.model_type}; this script exports Phi-3")
    model = export_model(config, SocketConfig(min_length=0), torch.float16, max_seq_len)
    attach_weights(model, index_checkpoint(checkpoint), config.tie_word_embeddings)
    save_graph(model, output)

    rope = config.rope_parameters
    if rope["rope_type"] == "longrope":
        chosen = "long" if max_seq_len > rope["original_max_position_embeddings"] else "short"
        print(f"{output}: rotary frequencies of the {chosen} set, for texts up to {max_seq_len} tokens")
    else:
        print(f"{output}: one set of rotary frequencies ({rope['rope_type']})")


if __name__ == "__main__":
    typer.run(main)
