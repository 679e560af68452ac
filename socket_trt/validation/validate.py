"""Validate an engine directory: load the PyTorch model, run the gates, write validation.json."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from polygraphy.logger import G_LOGGER

from socket_trt import names
from socket_trt.config import AttentionKind, OperatorAttributes
from socket_trt.engine.build import TORCH_DTYPES
from socket_trt.engine.manifest import EngineDirectory, Manifest
from socket_trt.models.checkpoint import load_config
from socket_trt.models.packed import Observer, PackedModel, empty_caches, freeze_rope
from socket_trt.progress import Progress
from socket_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from socket_trt.runtime.session import Session
from socket_trt.validation import gates
from socket_trt.validation.gates import OperatorCall
from socket_trt.validation.report import VALIDATION_FILE, Gate, GateResult, ValidationReport
from socket_trt.validation.runners import feed_dict
from socket_trt.validation.scenario import Scenario, make_scenario
from socket_trt.validation.variants import EngineGraph

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GREEDY_PROMPT, GREEDY_TOKENS = 512, 24


def validate_engine(engine: EngineDirectory, progress: Progress, seed: int = 0) -> ValidationReport:
    """Run every gate and leave the report in the engine directory.

    Raises EngineError or CheckpointError where the directory cannot be run at all; a gate that fails is in the report.
    """
    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # failures are the report's to tell
    begin = time.perf_counter()
    engine.check()
    manifest = engine.manifest
    tolerances = gates.check_supported_dtype(manifest.dtype)
    graph = EngineGraph(engine)
    scenario = make_scenario(manifest, seed)
    with progress.task("Loading the PyTorch model"):
        model = load_model(engine)

    def open_dense() -> Session:
        changed = None if manifest.attention is AttentionKind.dense else gates.keeps_everything(graph)
        return OnnxRuntimeSession(engine, graph=changed)

    with progress.task("Recording operator inputs"):
        calls = record_calls(model, manifest, scenario)
    prompt = scenario.tokens[0][: min(GREEDY_PROMPT, manifest.max_seq_len - GREEDY_TOKENS)].tolist()
    runs: dict[Gate, Callable[[], GateResult]] = {
        Gate.whole_model: lambda: gates.whole_model(open_dense, model, scenario, tolerances),
        Gate.operators: lambda: gates.operators(graph, calls, tolerances),
        Gate.code_bits: lambda: gates.code_bits_written(graph, calls, tolerances),
        Gate.selections: lambda: _selections(graph, calls, manifest),
        Gate.greedy: lambda: gates.greedy_text(open_dense, model, prompt, GREEDY_TOKENS, tolerances),
    }
    results = []
    for gate, run in runs.items():
        with progress.task(f"Comparing: {gate.value}"):
            results.append(_outcome(gate, run))

    report = ValidationReport(
        engine_graph_sha256=manifest.graph.sha256,
        model=manifest.model.name,
        family=manifest.model.family,
        dtype=manifest.dtype,
        attention=manifest.attention.value,
        versions=manifest.versions,
        sequence_lengths=scenario.lengths,
        seconds=round(time.perf_counter() - begin, 2),
        gates=results,
    )
    (engine.path / VALIDATION_FILE).write_text(report.model_dump_json(indent=2) + "\n")
    return report


def load_model(engine: EngineDirectory) -> PreTrainedModel:
    """Transformers' own model from the engine's checkpoint, in the engine's dtype."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    load_config(engine.checkpoint_directory)  # one line where it is not there
    model = AutoModelForCausalLM.from_pretrained(
        engine.checkpoint_directory, dtype=TORCH_DTYPES[engine.manifest.dtype], attn_implementation="eager"
    )
    freeze_rope(model, engine.manifest.max_seq_len)
    return model.eval()


def record_calls(model: PreTrainedModel, manifest: Manifest, scenario: Scenario) -> list[OperatorCall]:
    """Inputs of every layer's operator in every step, from the PyTorch model with the reference operator in it."""
    stock = model.config._attn_implementation
    packed = PackedModel(model, manifest.socket, manifest.model.head_size)
    calls: list[OperatorCall] = []
    caches = empty_caches(
        manifest.model.layers,
        scenario.num_pages,
        manifest.model.kv_heads,
        manifest.model.head_size,
        manifest.socket,
        model.dtype,
    )
    try:
        for number, step in enumerate(scenario.steps):
            packed.observe = _recorder(calls, number)
            inputs = [torch.from_numpy(array) for array in feed_dict(step).values()]
            with torch.no_grad():
                _, caches = packed(*inputs, caches)
    finally:
        model.set_attn_implementation(stock)
    return calls


def _recorder(calls: list[OperatorCall], step: int) -> Observer:
    def record(layer: int, inputs: tuple[torch.Tensor, ...], attributes: OperatorAttributes) -> None:
        arrays = {
            name: tensor.detach().contiguous().numpy()
            for name, tensor in zip(names.OPERATOR_INPUTS, inputs, strict=True)
        }
        calls.append(OperatorCall(layer, step, arrays, attributes))

    return record


def _outcome(gate: Gate, run: Callable[[], GateResult]) -> GateResult:
    """The gate's result; an engine that cannot even run what the gate feeds it has failed the gate."""
    try:
        return run()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return GateResult(gate=gate, outcome="failed", measured="did not run", bound="-", detail=reason[:200])


def _selections(graph: EngineGraph, calls: list[OperatorCall], manifest: Manifest) -> GateResult:
    if manifest.attention is AttentionKind.dense:
        return GateResult(
            gate=Gate.selections, outcome="skipped", measured="-", bound="-", detail="a dense engine selects nothing"
        )
    return gates.selections(graph, calls, gates.TOLERANCES[manifest.dtype])
