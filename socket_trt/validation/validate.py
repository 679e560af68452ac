"""Validate an engine directory: gather what PyTorch expects, run the gates, write validation.json."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from polygraphy.logger import G_LOGGER

from socket_trt.config import AttentionKind
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import MissingDependencyError
from socket_trt.progress import Progress
from socket_trt.validation import gates
from socket_trt.validation.reference import (
    REFERENCE_FILE,
    RecordedReference,
    Reference,
    greedy_prompt,
    record_reference,
)
from socket_trt.validation.report import VALIDATION_FILE, Gate, GateResult, ValidationReport
from socket_trt.validation.scenario import Scenario, make_scenario
from socket_trt.validation.under_test import EngineUnderTest, OnnxRuntimeEngine, TensorRTEngine

_OF_PYTORCH = (Gate.whole_model, Gate.operators, Gate.code_bits, Gate.selections, Gate.greedy)
_TORCH_PACKAGES = ("torch", "transformers", "onnxscript")


def validate_engine(engine: EngineDirectory, progress: Progress, seed: int = 0) -> ValidationReport:
    """Run every gate and leave the report in the engine directory.

    PyTorch's answers are read from `reference.npz` where there is one for this seed, else computed.  A TensorRT engine on
    a machine with neither is compared with ONNX Runtime alone.

    Raises EngineError or CheckpointError where the directory cannot be run or written at all; a gate that fails is in the
    report.
    """
    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # failures are the report's to tell
    begin = time.perf_counter()
    engine.check()
    engine.check_writable()
    manifest = engine.manifest
    tolerances = gates.tolerances_of(manifest.backend, manifest.dtype)
    scenario = make_scenario(manifest, seed)
    onnxruntime = OnnxRuntimeEngine(engine)
    on_gpu = manifest.backend == "tensorrt"
    under_test: EngineUnderTest = TensorRTEngine(engine, progress) if on_gpu else onnxruntime
    reference = _reference(engine, scenario, tolerances, seed, progress)

    results = []
    for gate, run in _gates(engine, under_test, onnxruntime, reference, scenario, tolerances).items():
        with progress.task(f"Comparing: {gate.value}"):
            results.append(_outcome(gate, run))
    report = ValidationReport(
        engine_graph_sha256=manifest.graph.sha256,
        model=manifest.model.name,
        family=manifest.model.family,
        dtype=manifest.dtype,
        attention=manifest.attention.value,
        versions=manifest.versions | ({"tensorrt": manifest.plan.tensorrt} if manifest.plan is not None else {}),
        sequence_lengths=scenario.lengths,
        seconds=round(time.perf_counter() - begin, 2),
        gates=results,
    )
    (engine.path / VALIDATION_FILE).write_text(report.model_dump_json(indent=2) + "\n")
    return report


def record_answers(engine: EngineDirectory, progress: Progress, seed: int = 0) -> Path:
    """Write what PyTorch expects of this engine to `reference.npz` in its directory; needs no TensorRT.

    Raises MissingDependencyError where there is no PyTorch, EngineError or CheckpointError as `validate_engine` does.
    """
    engine.check()
    engine.check_writable()
    manifest = engine.manifest
    tolerances = gates.tolerances_of(manifest.backend, manifest.dtype)
    scenario = make_scenario(manifest, seed)
    reference = _compute(engine, scenario, progress)
    with progress.task("Recording PyTorch's answers"):
        return record_reference(engine, scenario, reference, tolerances.margins, seed)


def _reference(
    engine: EngineDirectory, scenario: Scenario, tolerances: gates.Tolerances, seed: int, progress: Progress
) -> Reference | None:
    if (engine.path / REFERENCE_FILE).is_file():
        return RecordedReference(engine, scenario, tolerances.margins, seed)
    if engine.manifest.backend == "tensorrt" and not all(map(importlib.util.find_spec, _TORCH_PACKAGES)):
        return None
    return _compute(engine, scenario, progress)


def _compute(engine: EngineDirectory, scenario: Scenario, progress: Progress) -> Reference:
    try:
        from socket_trt.validation.torch_reference import TorchReference, load_model
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"PyTorch's answers need the package '{error.name}': pip install 'socket-trt[validate]'"
        ) from None
    with progress.task("Loading the PyTorch model"):
        model = load_model(engine)
    with progress.task("Recording operator inputs"):
        return TorchReference(model, engine.manifest, scenario)


def _gates(
    engine: EngineDirectory,
    under_test: EngineUnderTest,
    onnxruntime: OnnxRuntimeEngine,
    reference: Reference | None,
    scenario: Scenario,
    tolerances: gates.Tolerances,
) -> dict[Gate, Callable[[], GateResult]]:
    """What to run, in the report's order."""
    open_dense = under_test.open_dense
    runs: dict[Gate, Callable[[], GateResult]] = {}
    if reference is None:
        reason = f"no {REFERENCE_FILE} (socket-trt validate --record, where PyTorch is), and no PyTorch here"
        runs |= {gate: partial(_skipped, gate, reason) for gate in _OF_PYTORCH}
    else:
        known = reference
        runs |= {
            Gate.whole_model: lambda: gates.whole_model(open_dense, known, scenario, tolerances),
            Gate.operators: lambda: gates.operators(under_test, known, tolerances),
            Gate.code_bits: lambda: gates.code_bits_written(under_test, known, tolerances),
            Gate.selections: lambda: gates.selections(under_test, known, tolerances),
            Gate.greedy: lambda: gates.greedy_text(open_dense, known.greedy(), tolerances, Gate.greedy),
        }
        if engine.manifest.attention is AttentionKind.dense:
            runs[Gate.selections] = partial(_skipped, Gate.selections, "a dense engine selects nothing")
    if under_test is not onnxruntime:
        prompt = greedy_prompt(engine.manifest, scenario)

        def greedy_runtimes() -> GateResult:
            expected = gates.generate_greedily(onnxruntime.open_dense, prompt)
            return gates.greedy_text(open_dense, expected, tolerances, Gate.greedy_runtimes)

        runs[Gate.runtimes] = lambda: gates.runtimes(open_dense, onnxruntime.open_dense, scenario, tolerances)
        runs[Gate.greedy_runtimes] = greedy_runtimes
    return runs


def _skipped(gate: Gate, reason: str) -> GateResult:
    return GateResult(gate=gate, outcome="skipped", measured="-", bound="-", detail=reason)


def _outcome(gate: Gate, run: Callable[[], GateResult]) -> GateResult:
    """The gate's result; an engine that cannot even run what the gate feeds it has failed the gate."""
    try:
        return run()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return GateResult(gate=gate, outcome="failed", measured="did not run", bound="-", detail=reason[:200])
