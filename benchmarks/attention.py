"""Time the SocketAttention operator against dense attention on one GPU.

    python benchmarks/attention.py --output benchmarks/results

Every figure is the median over replays of a CUDA graph that calls the operator once on each of several input sets, which
together exceed the L2 cache.  Stages are differences: the operator up to a stage, less the operator up to the one
before.  Dense baselines run on the same bytes in the same process: PyTorch's SDPA with cuDNN and with flash attention,
FlashInfer and FlashAttention-3 where they are installed, and this library's own dense decode.  Writes attention-<gpu>.json, .md and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.dense_backends import BACKENDS, is_installed
from benchmarks.files import gpu_slug, write_results
from socket_trt.config import INT32_MAX, SocketConfig, attended_budget, code_bits
from socket_trt.native import STAGES, load_library, native_attention, params_of

QUERY_HEADS, KV_HEADS, HEAD_SIZE, TABLES, PAGE_SIZE = 32, 8, 128, 60, 128
SINK = WINDOW = 128
# What has just been allocated and filled is slower at first: 8 x 128K by 7 %.
WARM_UP_SECONDS = 0.1
DECODE_STAGES = ("append", "score", "select", "attend", "combine")


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    planes: int = 8
    permille: int = 30
    budget_tokens: int = 0
    selection: str = "query_head"
    goal: tuple[float, float] | None = None  # ratio to dense to reach: at least, and hoped for

    @property
    def config(self) -> SocketConfig:
        return SocketConfig.create(
            tables=TABLES, planes=self.planes, temperature=0.3 if self.planes == 8 else 0.4, sink=SINK, window=WINDOW,
            budget_tokens=self.budget_tokens, budget_permille=self.permille, page_size=PAGE_SIZE,
            selection=self.selection, min_length=0,
        )  # fmt: skip

    @property
    def kept(self) -> int:
        """Tokens that one head attends to."""
        budget = attended_budget(self.length, self.budget_tokens, self.permille)
        return min(self.length, SINK + WINDOW + budget)

    @property
    def scored_bytes(self) -> int:
        return self.batch * KV_HEADS * self.length * (TABLES * code_bits(self.planes) // 8 + 2)

    @property
    def selecting_heads(self) -> int:
        return KV_HEADS if self.selection == "kv_head" else QUERY_HEADS

    @property
    def kept_bytes(self) -> int:
        """Keys and values that must be read, where no two query heads choose the same token."""
        return min(self.batch * self.selecting_heads * self.kept * HEAD_SIZE * 4, self.dense_bytes)

    @property
    def dense_bytes(self) -> int:
        return self.batch * KV_HEADS * self.length * HEAD_SIZE * 4

    @property
    def fields(self) -> dict[str, Any]:
        """What a row of results says of it."""
        return {
            "batch": self.batch,
            "length": self.length,
            "planes": self.planes,
            "kept_fraction": self.permille / 1000,
            "selection": self.selection,
        }


K = 1024
SHAPES = (
    Shape(1, 8 * K),
    Shape(1, 16 * K),
    Shape(1, 32 * K, goal=(1.3, 1.8)),
    Shape(1, 64 * K),
    Shape(1, 128 * K, goal=(2.5, 3.2)),
    Shape(1, 512 * K, goal=(3.0, 3.6)),
    Shape(8, 32 * K),
    Shape(8, 128 * K, goal=(3.0, 3.6)),
    Shape(8, 128 * K, selection="kv_head", goal=(3.8, 5.5)),
    Shape(1, 128 * K, planes=10, goal=(2.0, 2.8)),
    Shape(8, 128 * K, permille=50, budget_tokens=1024, goal=(2.5, 3.0)),
)
SHAPES_BEHIND = (Shape(1, 32 * K), Shape(1, 128 * K), Shape(4, 128 * K))  # also timed behind other kernels


class Inputs:
    """One set of inputs of a decode step, or of a prefill chunk of `tokens`."""

    def __init__(self, shape: Shape, seed: int, tokens: int = 1) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.shape = shape
        pages_each = -(-shape.length // PAGE_SIZE)
        pages = shape.batch * pages_each + 1

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device="cuda", dtype=torch.float16)

        def integers(low: int, high: int, size: Sequence[int]) -> Tensor:
            return torch.randint(low, high, tuple(size), generator=generator, device="cuda", dtype=torch.int32)

        self.query = normal(1, QUERY_HEADS, shape.batch * tokens, HEAD_SIZE)
        self.key, self.value = (normal(1, KV_HEADS, shape.batch * tokens, HEAD_SIZE) for _ in range(2))
        self.key_cache, self.value_cache = (normal(pages, KV_HEADS, PAGE_SIZE, HEAD_SIZE) for _ in range(2))
        words = PAGE_SIZE * code_bits(shape.planes) // 32
        self.code_cache = integers(-(2**31), 2**31 - 1, (pages, KV_HEADS, TABLES, words))
        if shape.planes > 8:
            mask = (1 << shape.planes) - 1
            self.code_cache &= mask | mask << 16
        self.norm_cache = self.value_cache.float().norm(dim=-1).half()
        order = torch.randperm(pages - 1, generator=generator, device="cuda") + 1
        self.page_table = order.to(torch.int32).view(shape.batch, pages_each)
        self.past_length = torch.full((shape.batch,), shape.length - tokens, dtype=torch.int32, device="cuda")
        self.query_start = torch.arange(0, shape.batch + 1, dtype=torch.int32, device="cuda") * tokens
        self.planes = normal(TABLES, shape.planes, HEAD_SIZE)
        self.output = torch.empty_like(self.query)
        self.attributes = shape.config.attributes(HEAD_SIZE**-0.5)
        self.tokens = tokens

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (
            self.query, self.key, self.value, self.key_cache, self.value_cache, self.code_cache, self.norm_cache,
            self.page_table, self.past_length, self.query_start, self.planes,
        )  # fmt: skip

    def socket(self, workspace: Tensor, stages: int = 0, dense: bool = False) -> None:
        attributes = self.attributes.replace(min_length=INT32_MAX) if dense else self.attributes
        native_attention(
            *self.tensors, attributes, in_place=True, output=self.output, workspace=workspace, stages=stages
        )

    def sdpa(self, backend: SDPBackend) -> Tensor:
        """The same bytes as contiguous keys and values."""
        shape = self.shape
        sizes = (shape.batch, KV_HEADS, shape.length, HEAD_SIZE)
        keys, values = (x.view(-1)[: math.prod(sizes)].view(sizes) for x in (self.key_cache, self.value_cache))
        query = self.query.view(shape.batch, QUERY_HEADS, self.tokens, HEAD_SIZE)
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def time_graph(calls: Sequence[Callable[[], object]], repeats: int = 15) -> float:
    """Microseconds of one call: the median over replays of a graph of all calls, after WARM_UP_SECONDS of replays."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    until = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < until:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, read and written."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.add(source, 0.0, out=target)  # a kernel: cudaMemcpy's copy engines are slower
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * source.nbytes / statistics.median(times)


def make_sets(shape: Shape, tokens: int = 1) -> list[Inputs]:
    """Enough sets that what the sparse operator touches exceeds the L2 cache four times."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = math.ceil(4 * cache / (shape.scored_bytes + shape.kept_bytes))
    return [Inputs(shape, seed, tokens) for seed in range(max(2, min(count, 24)))]


def workspace_for(inputs: Inputs) -> Tensor:
    params = params_of(inputs.query, inputs.key_cache, inputs.page_table, inputs.planes, inputs.attributes)
    dense = inputs.attributes.replace(min_length=INT32_MAX)
    dense_params = params_of(inputs.query, inputs.key_cache, inputs.page_table, inputs.planes, dense)
    size = max(load_library().workspace_bytes(p) for p in (params, dense_params))
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def dense_times(sets: list[Inputs], workspace: Tensor) -> dict[str, float]:
    times = {"own": time_graph([lambda x=x: x.socket(workspace, dense=True) for x in sets])}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            times[name] = time_graph([lambda x=x, b=backend: x.sdpa(b) for x in sets])
        except RuntimeError as error:
            print(f"  {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    for name in filter(is_installed, BACKENDS):
        try:
            times[name] = time_graph(BACKENDS[name].calls(sets))
        except Exception as error:  # whatever another library raises, the comparison goes on without it
            print(f"  {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return times


def measure(shape: Shape, bandwidth: float) -> dict[str, Any]:
    sets = make_sets(shape)
    workspace = workspace_for(sets[0])
    total = time_graph([lambda x=x: x.socket(workspace) for x in sets])
    stages, before, bits = {}, 0.0, 0
    for stage in DECODE_STAGES:
        bits |= STAGES[stage]
        until = time_graph([lambda x=x, b=bits: x.socket(workspace, stages=b) for x in sets])
        stages[stage] = until - before
        before = until
    dense = dense_times(sets, workspace)
    backend = min((n for n in dense if n != "own"), key=lambda n: dense[n])
    return {
        **shape.fields,
        "kept_tokens": shape.kept,
        "socket_us": total,
        "dense_us": dense[backend],
        "dense_backend": backend,
        "ratio": dense[backend] / total,
        "own_dense_us": dense["own"],
        "dense_by_backend_us": dense,
        "stages_us": stages,
        "floor_us": (shape.scored_bytes + shape.kept_bytes) / bandwidth * 1e6,
        "dense_floor_us": shape.dense_bytes / bandwidth * 1e6,
        "score_bandwidth_share": shape.scored_bytes / bandwidth * 1e6 / stages["score"],
        "goal": shape.goal,
    }


def measure_prefill(tokens: int = 2048, cached: int = 32 * K) -> dict[str, Any]:
    """A chunk of a prompt over a cache.  SDPA's kernels see all keys (no mask): speeds compare operations a second."""
    shape = Shape(1, cached + tokens)
    sets = [Inputs(shape, seed, tokens) for seed in range(2)]
    workspace = workspace_for(sets[0])
    flops = 4 * QUERY_HEADS * HEAD_SIZE * tokens
    whole = time_graph([lambda x=x: x.socket(workspace) for x in sets])
    kernel = time_graph([lambda x=x: x.socket(workspace, stages=STAGES["prefill"]) for x in sets])
    result = {
        "tokens": tokens,
        "cached": cached,
        "operator_us": whole,
        "prefill_kernel_us": kernel,
        "operator_tflops": flops * (cached + tokens / 2) / whole * 1e-6,
    }
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        time = time_graph([lambda x=x, b=backend: x.sdpa(b) for x in sets])
        result |= {f"{name}_us": time, f"{name}_tflops": flops * (cached + tokens) / time * 1e-6}
    return result


class OtherKernels:
    """What runs between two layers' attention, more or less: products that read weights, and small kernels."""

    def __init__(self) -> None:
        self.hidden = torch.randn(1, 4096, dtype=torch.float16, device="cuda")
        self.wide = torch.randn(4096, 32 * K, dtype=torch.float16, device="cuda")  # 268 MB, several times the L2 cache
        self.square = torch.randn(4096, 4096, dtype=torch.float16, device="cuda")

    def __call__(self) -> None:
        x = torch.nn.functional.silu(torch.mm(self.hidden, self.wide))
        x = torch.layer_norm(x, x.shape[-1:])
        torch.mm(self.hidden, self.square)
        torch.softmax(x, -1)


def measure_behind(shape: Shape) -> dict[str, Any]:
    """The operator after itself, and behind other kernels: what a graph with it takes more than one without it."""
    sets = make_sets(shape)
    workspace = workspace_for(sets[0])
    others = OtherKernels()
    alone = time_graph([others] * len(sets), repeats=25)
    result: dict[str, Any] = {"batch": shape.batch, "length": shape.length}
    for name, dense in (("socket", False), ("dense", True)):
        calls = [lambda x=x, d=dense: x.socket(workspace, dense=d) for x in sets]
        result[f"{name}_us"] = time_graph(calls)
        alternating = [each for call in calls for each in (others, call)]
        result[f"{name}_behind_us"] = 2 * time_graph(alternating, repeats=25) - alone
    return result


SHAPE_COLUMNS = "batch | length | R | kept | selection"


def shape_cells(row: dict[str, Any]) -> str:
    """Of a row of results, the cells under SHAPE_COLUMNS."""
    shape = (row["batch"], f"{row['length'] // K}K", row["planes"], f"{row['kept_fraction']:.0%}", row["selection"])
    return " | ".join(map(str, shape))


def table(results: dict[str, Any]) -> str:
    lines = [
        f"# Attention on {results['gpu']}",
        "",
        f"float16, {QUERY_HEADS} query heads, {KV_HEADS} KV heads, head size {HEAD_SIZE}, L = {TABLES}, pages of "
        f"{PAGE_SIZE}, sink {SINK}, window {WINDOW}; times in microseconds; copy bandwidth "
        f"{results['copy_bandwidth'] / 1e12:.2f} TB/s.",
        "",
        f"Made by `{results['command']}` with PyTorch {results['torch']}, CUDA {results['cuda']}.",
        "",
        f"| {SHAPE_COLUMNS} | SOCKET | best dense | ratio | must / aim | byte floor | own dense "
        "| append | score | select | attend | combine | score: share of copy bandwidth |",
        "|" + "---|" * 17,
    ]
    for row in results["rows"]:
        goal = "" if row["goal"] is None else f"{row['goal'][0]} / {row['goal'][1]}"
        stages = " | ".join(f"{row['stages_us'][s]:.1f}" for s in DECODE_STAGES)
        lines.append(
            f"| {shape_cells(row)} | {row['socket_us']:.1f} | {row['dense_us']:.1f} ({row['dense_backend']}) "
            f"| **{row['ratio']:.2f}** | {goal} | {row['floor_us']:.1f} | {row['own_dense_us']:.1f} | {stages} "
            f"| {row['score_bandwidth_share']:.0%} |"
        )
    prefill = results.get("prefill")
    if prefill:
        lines += [
            "",
            f"Prefill of {prefill['tokens']} tokens over {prefill['cached'] // K}K cached: operator "
            f"{prefill['operator_us']:.0f} us ({prefill['operator_tflops']:.0f} TFLOP/s; attention kernel alone "
            f"{prefill['prefill_kernel_us']:.0f} us), cuDNN {prefill['cudnn_us']:.0f} us "
            f"({prefill['cudnn_tflops']:.0f} TFLOP/s), flash {prefill['flash_us']:.0f} us "
            f"({prefill['flash_tflops']:.0f} TFLOP/s).",
        ]
    if results.get("behind"):
        lines += [
            "",
            "Behind a matrix product that reads 268 MB and four smaller kernels, instead of behind itself:",
            "",
            "| batch | length | SOCKET | behind others | own dense | behind others |",
            "|" + "---|" * 6,
        ]
        for row in results["behind"]:
            times = " | ".join(
                f"{row[f'{name}_us']:.1f} | {row[f'{name}_behind_us']:.1f}" for name in ("socket", "dense")
            )
            lines.append(f"| {row['batch']} | {row['length'] // K}K | {times} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no matplotlib: no plot", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in results["rows"] if r["planes"] == 8 and r["kept_fraction"] == 0.03]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for batch, style in ((1, "-"), (8, "--")):
        own = sorted(
            (r for r in rows if r["batch"] == batch and r["selection"] == "query_head"), key=lambda r: r["length"]
        )
        lengths = [r["length"] / K for r in own]
        for field, label, color in (
            ("dense_us", "best dense", "tab:gray"),
            ("socket_us", "SOCKET", "tab:blue"),
            ("floor_us", "SOCKET byte floor", "tab:green"),
        ):
            left.plot(lengths, [r[field] for r in own], style, color=color, marker="o", label=f"{label}, batch {batch}")
        right.plot(lengths, [r["ratio"] for r in own], style, color="tab:blue", marker="o", label=f"batch {batch}")
    for r in rows:
        if r["selection"] == "kv_head":
            right.plot([r["length"] / K], [r["ratio"]], "^", color="tab:orange", label=f"batch {r['batch']}, kv_head")
    left.set(xscale="log", yscale="log", xlabel="context (K tokens)", ylabel="microseconds", title="one decode step")
    right.set(xscale="log", xlabel="context (K tokens)", ylabel="best dense / SOCKET", title="speed-up, 3 % kept")
    right.axhline(1, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory for the results; without it they are only printed")
    parser.add_argument("--only-goals", action="store_true", help="only the shapes that have a goal")
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--no-behind", action="store_true", help="do not time the operator behind other kernels")
    arguments = parser.parse_args()
    load_library().prepare()
    absent = [name for name in BACKENDS if not is_installed(name)]
    if absent:
        print(f"not installed, and left out: {', '.join(absent)}", file=sys.stderr)
    gpu = torch.cuda.get_device_name()
    results: dict[str, Any] = {
        "gpu": gpu,
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_bandwidth": copy_bandwidth(),
        "rows": [],
    }
    for shape in SHAPES:
        if arguments.only_goals and shape.goal is None:
            continue
        results["rows"].append(measure(shape, results["copy_bandwidth"]))
        torch.cuda.empty_cache()
    if not arguments.no_prefill:
        results["prefill"] = measure_prefill()
    if not arguments.no_behind:
        results["behind"] = [measure_behind(shape) for shape in SHAPES_BEHIND]
    text = table(results)
    print(text)
    if arguments.output:
        stem = arguments.output / f"attention-{gpu_slug(gpu)}"
        write_results(stem, results, text)
        plot(results, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
