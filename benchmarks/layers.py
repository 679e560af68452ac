"""Time what lies around attention in a decode step of Llama-3-8B's shapes: each kernel alone, and all of them together.

    python benchmarks/layers.py --output benchmarks/results

Products of one and two tokens by this project's kernel, by cuBLAS (through PyTorch) and as the bytes of the weight at the
bandwidth of plain reading; norms, rotary embeddings and gates; then 32 layers without their attention, and the head, as
one CUDA graph, where kernels overlap.  Every product in a graph has a weight of its own, of which no cache holds any.
Writes layers-<gpu>.json and .md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.attention import time_graph
from benchmarks.files import gpu_slug, output_directory, write_results
from socket_trt.native import call_layer, prepare_layers

LAYERS, HIDDEN, INNER, VOCABULARY = 32, 4096, 14336, 128256
QUERY_HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
JOINT = (QUERY_HEADS + 2 * KV_HEADS) * HEAD_SIZE
PRODUCTS = {
    "queries, keys, values": (JOINT, HIDDEN),
    "attention's output": (HIDDEN, HIDDEN),
    "gate and up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "head": (VOCABULARY, HIDDEN),
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float16) * shape[-1] ** -0.5


def enqueue(name: str, *arguments: Tensor | int | float) -> None:
    status = call_layer(name, *arguments)
    if status:
        raise RuntimeError(f"{name}: CUDA error {status}")


def multiply(x: Tensor, weight: Tensor, output: Tensor) -> None:
    enqueue("SocketTrtProduct", x, weight, output, x.shape[0], *weight.shape)


def multiply_by_cublas(x: Tensor, weight: Tensor, output: Tensor) -> None:
    torch.mm(x, weight.T, out=output)


class Model:
    """Random weights of all layers, and the tensors of a step of `tokens` tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.norms = [random(2, HIDDEN) for _ in range(LAYERS + 1)]
        self.weights = {n: [random(*s) for _ in range(1 if n == "head" else LAYERS)] for n, s in PRODUCTS.items()}
        sizes = {"x": HIDDEN, "sum": HIDDEN, "normed": HIDDEN, "branch": HIDDEN, "inner": INNER, "logits": VOCABULARY}
        sizes |= {"joint": JOINT, "gate_up": 2 * INNER, "cosines": HEAD_SIZE, "sines": HEAD_SIZE}
        self.t = {name: random(tokens, size) for name, size in sizes.items()}
        self.query = random(tokens, HIDDEN)
        self.key, self.value = random(tokens, KV_HEADS * HEAD_SIZE), random(tokens, KV_HEADS * HEAD_SIZE)

    def norm(self, layer: int, which: int) -> None:
        t, (source, target) = self.t, (("x", "sum"), ("sum", "x"))[which]
        enqueue(
            "SocketTrtAddRmsNorm", t[source], t["branch"], self.norms[layer][which], t[target], t["normed"],
            self.tokens, HIDDEN, 1e-5, 0,
        )  # fmt: skip

    def rotary(self) -> None:
        t = self.t
        enqueue(
            "SocketTrtSplitRotary", t["joint"], t["cosines"], t["sines"], self.query, self.key, self.value,
            self.tokens, QUERY_HEADS, KV_HEADS, HEAD_SIZE,
        )  # fmt: skip

    def gate(self) -> None:
        enqueue("SocketTrtSwiGlu", self.t["gate_up"], self.t["inner"], self.tokens, INNER)

    def step(self, product: Any) -> None:
        """All layers and the head, with queries in the place of what attention would give."""
        t, weights = self.t, self.weights
        for layer in range(LAYERS):
            self.norm(layer, 0)
            product(t["normed"], weights["queries, keys, values"][layer], t["joint"])
            self.rotary()
            product(self.query, weights["attention's output"][layer], t["branch"])
            self.norm(layer, 1)
            product(t["normed"], weights["gate and up"][layer], t["gate_up"])
            self.gate()
            product(t["inner"], weights["down"][layer], t["branch"])
        self.norm(LAYERS, 0)
        product(t["normed"], weights["head"][0], t["logits"])


def read_bandwidth() -> float:
    """Bytes a microsecond of summing 4 GB."""
    data = torch.ones(1 << 31, dtype=torch.float16, device="cuda").view(torch.int32)
    return data.numel() * 4 / time_graph([lambda: torch.amax(data)])


def measure(tokens: int, bandwidth: float) -> list[dict[str, Any]]:
    model, rows = Model(tokens), []
    for name, (count, columns) in PRODUCTS.items():
        x, output = random(tokens, columns), random(tokens, count)
        times = [
            time_graph([lambda x=x, w=w, output=output, p=p: p(x, w, output) for w in model.weights[name]])
            for p in (multiply, multiply_by_cublas)
        ]
        rows.append(
            {
                "tokens": tokens,
                "what": name,
                "us": times[0],
                "cublas_us": times[1],
                "read_us": 2 * count * columns / bandwidth,
            }
        )
    for what, call in (
        ("sum and norm", lambda: model.norm(0, 0)), ("rotary embedding", model.rotary), ("gate", model.gate)
    ):  # fmt: skip
        rows.append({"tokens": tokens, "what": what, "us": time_graph([call] * 50), "cublas_us": None, "read_us": None})
    times = [time_graph([lambda p=p: model.step(p)]) for p in (multiply, multiply_by_cublas)]
    read = sum((1 if n == "head" else LAYERS) * 2 * r * c for n, (r, c) in PRODUCTS.items()) / bandwidth
    rows.append(
        {"tokens": tokens, "what": "32 layers and head", "us": times[0], "cublas_us": times[1], "read_us": read}
    )
    return rows


def table(results: dict[str, Any]) -> str:
    lines = [
        f"# What lies around attention on {results['gpu']}",
        "",
        f"Microseconds; Llama-3-8B's shapes, float16. Plain reading: {results['read_tb_s']:.2f} TB/s.",
        "",
        f"Made by `{results['command']}` with PyTorch {results['torch']}, whose cuBLAS is of CUDA {results['cuda']}.",
        "",
        "| tokens | | bytes, read | this project's kernels | with products by cuBLAS |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [f"{row[k]:.1f}" if row[k] is not None else "" for k in ("read_us", "us", "cublas_us")]
        lines.append(f"| {row['tokens']} | {row['what']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    output = output_directory(__doc__)
    prepare_layers()
    bandwidth = read_bandwidth()
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "read_tb_s": bandwidth / 1e6,
        "rows": [row for tokens in (1, 2) for row in measure(tokens, bandwidth)],
    }
    text = table(results)
    print(text)
    if output:
        write_results(output / f"layers-{gpu_slug(results['gpu'])}", results, text)


if __name__ == "__main__":
    main()
