#!/usr/bin/env python
"""Rewrite an ONNX model that somebody else exported: its attentions become SocketAttention on packed tokens.

    python export/rewrite_onnx.py model.onnx model-socket.onnx --budget 0.05,1024

What it reads: opset-23 Attention as torch.onnx.export writes it, and com.microsoft::GroupQueryAttention as
onnxruntime-genai's model builder writes it (docs/rewriting.md).  Weights in external files stay where they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from socket_trt.config import Selection, SocketConfig, parse_budget
from socket_trt.errors import SocketTrtError
from socket_trt.onnx.rewrite import rewrite_file, weights_outside


def arguments() -> argparse.Namespace:
    defaults = SocketConfig.create()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the model, an .onnx file")
    parser.add_argument(
        "output", type=Path, help="the rewritten model; beside the source its weights are found at once"
    )
    parser.add_argument("--tables", type=int, default=defaults.tables, help="L, hash tables")
    parser.add_argument("--planes", type=int, default=defaults.planes, help="R, hyperplanes a table")
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="tau of the bucket probabilities"
    )
    parser.add_argument("--sink", type=int, default=defaults.sink, help="first tokens, always attended")
    parser.add_argument("--window", type=int, default=defaults.window, help="last tokens, always attended")
    parser.add_argument(
        "--budget",
        default=f"{defaults.budget_permille / 1000},{defaults.budget_tokens}",
        help="chosen tokens: a fraction of the length, a number, or both (the larger counts)",
    )
    parser.add_argument("--min-length", type=int, default=defaults.min_length, help="up to here attention is dense")
    parser.add_argument("--selection", choices=[s.name for s in Selection], default=defaults.selection.name)
    parser.add_argument("--page-size", type=int, default=defaults.page_size, help="tokens a page of the cache")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the hyperplanes")
    parser.add_argument(
        "--sliding-window",
        type=int,
        help="tokens a query sees, for masks that cannot be read: -1 says that such a mask is causal and nothing else",
    )
    parser.add_argument("--copy-weights", action="store_true", help="put all weights into OUTPUT.data")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    try:
        config = SocketConfig.create(
            tables=args.tables,
            planes=args.planes,
            temperature=args.temperature,
            sink=args.sink,
            window=args.window,
            min_length=args.min_length,
            selection=args.selection,
            page_size=args.page_size,
            seed=args.seed,
            **parse_budget(args.budget),
        )
        report = rewrite_file(
            args.source,
            args.output,
            config,
            sliding_window=args.sliding_window,
            copy_weights=args.copy_weights,
            force=args.force,
        )
        outside = weights_outside(args.output)
    except SocketTrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    for layer, attention in enumerate(report.attentions):
        window = f", sliding window {attention.sliding_window}" if attention.sliding_window > 0 else ""
        softcap = f", softcap {attention.softcap:g}" if attention.softcap else ""
        heads = f"{attention.query_heads} query heads, {attention.kv_heads} KV heads"
        print(
            f"layer {layer}: {attention.operator} '{attention.node}' ({heads}, scale {attention.scale:g}{window}{softcap})"
        )
    print(f"{report.replaced} attentions replaced, opset {report.opset}: {args.output}")
    if outside:
        print(
            f"note: its weights lie in another folder ({', '.join(outside)}), where ONNX Runtime does not look by itself;"
        )
        print(f"      write the output to {Path(outside[0]).parent}, or use --copy-weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
