"""Speed of a TensorRT engine: decode steps of dense and SOCKET attention over lengths and batches, prefill, memory.

The caches are filled with random keys and values (`socket_trt.runtime.random_cache`), so that a length costs no prefill
of that length.  Every step of a case is the same one: it writes the same token to the same place again.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from socket_trt.cases import Case
from socket_trt.config import INT32_MAX, AttentionKind
from socket_trt.engine.compile import Compiled, compile_variant
from socket_trt.engine.manifest import EngineDirectory, Manifest
from socket_trt.engine.tensorrt import open_tensorrt
from socket_trt.errors import ConfigError, EngineError
from socket_trt.progress import Progress
from socket_trt.runtime.random_cache import TOKENS, draw_pages, fill_caches
from socket_trt.runtime.session import StepBatch
from socket_trt.runtime.tensorrt_session import TensorRTSession

if TYPE_CHECKING:
    from socket_trt.engine.tensorrt import TensorRT

_LOG = logging.getLogger("socket_trt.benchmark")
_WARM_UP = 5


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """cases: decode steps to time, `steps` times each.  prefill: tokens of a prompt to time, in chunks; 0: none.

    dense: time the dense baseline too, from the same graph.  random_weights: leave the checkpoint alone.
    layers: also time each layer of the plan in the first case.
    """

    cases: Sequence[Case]
    steps: int = 50
    prefill: int = 0
    dense: bool = True
    random_weights: bool = False
    layers: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """Milliseconds of a step: `step_ms` as the caller waits for logits (mean), `gpu_ms` on the GPU (median)."""

    attention: str
    batch: int
    context: int
    step_ms: float
    gpu_ms: float

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.batch / self.step_ms


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """Everything that was measured, and on what.  `cublas`: version of the cuBLAS that computed products, if it did."""

    engine: str
    model: str
    gpu: str
    tensorrt: str
    plugin: str
    parameters: dict[str, Any]
    build_seconds: dict[str, float]
    memory_bytes: dict[str, int]
    decode: list[DecodeResult]
    prefill: list[dict[str, Any]]
    layers: dict[str, list[tuple[str, float]]]
    cublas: str | None = None

    def as_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        for entry, result in zip(fields["decode"], self.decode, strict=True):
            entry["tokens_per_second"] = round(result.tokens_per_second, 2)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> BenchReport:
        """A report that `as_dict` gave."""
        known = [field.name for field in dataclasses.fields(DecodeResult)]
        decode = [DecodeResult(**{name: entry[name] for name in known}) for entry in fields["decode"]]
        return cls(**fields | {"decode": decode})

    def speedup(self, result: DecodeResult) -> float | None:
        """How much faster than the dense engine in the same case; None for itself, or where it was not timed."""
        if result.attention == AttentionKind.dense.value:
            return None
        same = [r for r in self.decode if (r.batch, r.context) == (result.batch, result.context)]
        dense = next((r for r in same if r.attention == AttentionKind.dense.value), None)
        return None if dense is None else dense.step_ms / result.step_ms


def run_benchmark(engine: EngineDirectory, options: BenchOptions, progress: Progress) -> BenchReport:
    """Time an engine directory.  Raises ConfigError for cases beyond its limits, EngineError where it cannot run."""
    manifest = engine.manifest
    _check_cases(manifest, options)
    if manifest.plan is None:
        raise EngineError(f"{engine.path}: has no TensorRT plan yet; run socket-trt compile {engine.path}")
    tensorrt = open_tensorrt()
    prefill_pages = -(-options.prefill // manifest.socket.page_size)
    num_pages = 1 + max([prefill_pages, *(case.pages(manifest) for case in options.cases)])
    with progress.task("Drawing keys and values"):
        cached = num_pages * manifest.socket.page_size * manifest.model.kv_heads
        pages = draw_pages(manifest, min(TOKENS, cached), options.seed)
    decode: list[DecodeResult] = []
    prefill: list[dict[str, Any]] = []
    layers: dict[str, list[tuple[str, float]]] = {}
    memory: dict[str, int] = {}
    build_seconds = {manifest.attention.value: manifest.plan.build_seconds}
    for kind in _kinds(manifest, options):
        variant = _variant(engine, kind, tensorrt, progress)
        if variant is not None:
            build_seconds[kind] = variant.record.build_seconds
        session = TensorRTSession(
            engine,
            max(2, num_pages),
            compiled=variant,
            random_weights=options.random_weights,
            progress=progress,
        )
        try:
            memory = session.memory
            fill_caches(session.caches, pages, session.stream, options.seed)
            for case in options.cases:
                with progress.task(f"Decoding, {kind}: {case}"):
                    decode.append(_time_decode(session, kind, case, options))
                # The report comes last: should a later case fail, this one's figures are not lost.
                _LOG.info("%s, %s: %.3f ms a step, %.3f on the GPU", kind, case, decode[-1].step_ms, decode[-1].gpu_ms)
            if options.layers:
                layers[kind] = session.profile(decode_batch(session, options.cases[0], options.seed))
            if options.prefill:
                with progress.task(f"Prefilling, {kind}: {options.prefill} tokens"):
                    prefill.append({"attention": kind} | _time_prefill(session, options))
        finally:
            session.close()
    return BenchReport(
        engine=str(engine.path),
        model=f"{manifest.model.name}, {manifest.model.layers} layers, {manifest.dtype}",
        gpu=tensorrt.gpu.name,
        tensorrt=tensorrt.version,
        plugin=f"{tensorrt.plugin.release} {tensorrt.plugin.sha256[:12]}",
        parameters=manifest.socket.model_dump(mode="json") | {"random_weights": options.random_weights},
        build_seconds=build_seconds,
        memory_bytes=memory,
        decode=decode,
        prefill=prefill,
        layers=layers,
        cublas=manifest.plan.cublas,
    )


def _check_cases(manifest: Manifest, options: BenchOptions) -> None:
    limits = manifest.limits()
    for case in options.cases:
        if case.batch > limits.max_batch_size or case.context > limits.max_seq_len:
            raise ConfigError(
                f"{case}: this engine takes {limits.max_batch_size} sequences of {limits.max_seq_len} tokens; build it "
                "with a larger --max-batch-size or --max-seq-len"
            )
    if options.prefill > limits.max_seq_len:
        raise ConfigError(f"--prefill {options.prefill}: this engine takes {limits.max_seq_len} tokens")


def _kinds(manifest: Manifest, options: BenchOptions) -> list[str]:
    own = manifest.attention.value
    return [AttentionKind.dense.value, own] if options.dense and own != AttentionKind.dense.value else [own]


def _variant(engine: EngineDirectory, kind: str, tensorrt: TensorRT, progress: Progress) -> Compiled | None:
    """A plan of the same graph with dense attention; None where the engine's own plan is meant."""
    plan = engine.manifest.plan
    if kind == engine.manifest.attention.value or plan is None:
        return None
    return compile_variant(engine, tensorrt, progress, {"min_length": INT32_MAX})


def decode_batch(session: TensorRTSession, case: Case, seed: int) -> StepBatch:
    """One token of every sequence, at the end of its `context`; pages scattered over the pool."""
    limits, rng = session.limits, np.random.default_rng(seed)
    used = -(-case.context // limits.page_size)
    table = np.zeros((case.batch, limits.pages_per_sequence), np.int32)
    pages = rng.permutation(np.arange(1, limits.num_pages, dtype=np.int32))[: case.batch * used]
    table[:, :used] = pages.reshape(case.batch, used)
    past = np.full(case.batch, case.context - 1, np.int32)
    return StepBatch(
        input_ids=rng.integers(0, limits.vocabulary_size, case.batch, dtype=np.int32),
        position_ids=past,
        logits_indices=np.arange(case.batch, dtype=np.int32),
        page_table=table,
        past_length=past,
        query_start=np.arange(case.batch + 1, dtype=np.int32),
    )


def _time_decode(session: TensorRTSession, kind: str, case: Case, options: BenchOptions) -> DecodeResult:
    batch = decode_batch(session, case, options.seed)
    for _ in range(_WARM_UP):
        logits = session.step(batch)
    if not np.isfinite(logits).all():
        raise EngineError(f"{kind}, {case}: the engine's logits are not finite")
    on_gpu = []
    begin = time.perf_counter()
    for _ in range(options.steps):
        session.step(batch)
        on_gpu.append(session.gpu_milliseconds)
    step_ms = 1000 * (time.perf_counter() - begin) / options.steps
    return DecodeResult(kind, case.batch, case.context, step_ms, statistics.median(on_gpu))


def _time_prefill(session: TensorRTSession, options: BenchOptions) -> dict[str, Any]:
    """A prompt of `prefill` tokens in chunks as large as the plan takes; the second run counts."""
    limits, rng = session.limits, np.random.default_rng(options.seed)
    plan = session.record
    used = -(-options.prefill // limits.page_size)
    table = np.zeros((1, limits.pages_per_sequence), np.int32)
    table[0, :used] = np.arange(1, used + 1)
    tokens = rng.integers(0, limits.vocabulary_size, options.prefill, dtype=np.int32)
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        for first in range(0, options.prefill, plan.max_step_tokens):
            chunk = tokens[first : first + plan.max_step_tokens]
            session.step(
                StepBatch(
                    input_ids=chunk,
                    position_ids=np.arange(first, first + len(chunk), dtype=np.int32),
                    logits_indices=np.array([len(chunk) - 1], np.int32),
                    page_table=table,
                    past_length=np.array([first], np.int32),
                    query_start=np.array([0, len(chunk)], np.int32),
                )
            )
        seconds = time.perf_counter() - begin
    return {"tokens": options.prefill, "seconds": seconds, "tokens_per_second": options.prefill / seconds}


def plot(reports: Sequence[BenchReport], path: Path) -> None:
    """Milliseconds a step of every case, dense beside SOCKET.  Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    labels, width = [], 0.4
    for report in reports:
        for case in dict.fromkeys((r.batch, r.context) for r in report.decode):
            labels.append(f"{report.model.split(',')[0]}\nB{case[0]} {case[1] // 1024}K")
            for offset, kind, colour in ((-width / 2, "dense", "#9aa0a6"), (width / 2, "socket", "#76b900")):
                found = [r for r in report.decode if (r.batch, r.context) == case and r.attention == kind]
                if found:
                    bars = axes.bar(len(labels) - 1 + offset, found[0].step_ms, width, color=colour)
                    axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel("ms a decode step")
    axes.set_title(f"{reports[0].gpu}, TensorRT {reports[0].tensorrt}: dense (grey) and SOCKET (green)", fontsize=10)
    figure.savefig(path, dpi=150)
