"""The gates of validation; each compares one thing and returns a `GateResult`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator, SimpleCompareFunc

from socket_trt import names
from socket_trt.errors import EngineError
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import Scheduler
from socket_trt.runtime.session import Session, SessionLimits, StepBatch
from socket_trt.validation.reference import (
    GREEDY_TOKENS,
    Bools,
    Floats,
    GreedyText,
    Margins,
    OperatorCall,
    Reference,
)
from socket_trt.validation.report import Gate, GateResult
from socket_trt.validation.runners import KnownAnswers, SessionRunner, feed_dict
from socket_trt.validation.scenario import Scenario
from socket_trt.validation.selection_probe import Arrays, attended_tokens, attention_over, decode_rows, written_codes
from socket_trt.validation.under_test import EngineUnderTest

OpenSession = Callable[[], Session]


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """Bounds of the gates for one dtype on one runtime.

    logits          absolute and relative, on logits
    operator        absolute and relative, on an operator's outputs; `operator_quantile` of them must hold it (a top-M
                    set may differ where two scores tie, and then one head's output does)
    margins         a projection w . k below margin |w| |k| may fall on either side of zero; a score within a margin of
                    the threshold, relative, may be chosen or not
    tie             greedy tokens may differ where the two best logits are closer than this; 0: never
    own_sets        compare a decode row's output with exact attention over the set the operator chose (which is compared
                    by itself), because margins are too wide for one set
    """

    logits: float
    operator: float
    margins: Margins
    tie: float
    operator_quantile: float = 0.99
    own_sets: bool = False


TOLERANCES = {
    ("onnxruntime", "float32"): Tolerances(5e-5, 2e-5, Margins(1e-6, 1e-5), tie=0.0),
    ("onnxruntime", "float16"): Tolerances(3e-2, 3e-3, Margins(1e-6, 1e-5), tie=2e-2),
    # The kernels add up scores of 8 or 11 bits (docs/kernels.md); projections are sums of float32.
    ("tensorrt", "float16"): Tolerances(3e-2, 3e-3, Margins(1e-5, 2e-2), tie=2e-2, own_sets=True),
}


def whole_model(
    open_dense: OpenSession, reference: Reference, scenario: Scenario, tolerances: Tolerances
) -> GateResult:
    """Logits of the engine with a budget that keeps everything, against transformers' own model."""
    known = KnownAnswers(
        ({names.LOGITS: logits} for logits in reference.logits()), "transformers", feed_dict(scenario.steps[0])
    )
    bound, why = tolerances.logits, ""
    rounding = 2 * reference.rounding()
    if rounding > bound:  # sharp attention magnifies rounding, transformers' as well as ours
        bound, why = rounding, ": twice transformers' own distance from float64"
    return _logits_gate(Gate.whole_model, known, "transformers", open_dense, scenario, bound, why)


def runtimes(
    open_dense: OpenSession, open_onnxruntime: OpenSession, scenario: Scenario, tolerances: Tolerances
) -> GateResult:
    """The same graph on TensorRT and on ONNX Runtime, its budget keeping everything."""
    other = SessionRunner(open_onnxruntime, "onnxruntime", scenario.steps[0])
    return _logits_gate(Gate.runtimes, other, "ONNX Runtime", open_dense, scenario, tolerances.logits)


def _logits_gate(
    gate: Gate,
    expected: BaseRunner,
    whose: str,
    open_session: OpenSession,
    scenario: Scenario,
    bound: float,
    why: str = "",
) -> GateResult:
    """Logits of a session in every step, against those of `expected`."""
    runners = [expected, SessionRunner(open_session, "engine", scenario.steps[0])]
    results = Comparator.run(runners, data_loader=[feed_dict(step) for step in scenario.steps])
    compare = SimpleCompareFunc(atol=bound, rtol=bound, check_error_stat="elemwise")
    passed = bool(Comparator.compare_accuracy(results, compare_func=compare))
    pairs = zip(results[expected.name], results["engine"], strict=True)
    worst = max(float(np.abs(a[names.LOGITS] - b[names.LOGITS]).max()) for a, b in pairs)
    return GateResult(
        gate=gate,
        outcome="passed" if passed else "failed",
        measured=f"logits differ by {worst:.1e}",
        bound=f"{bound:.0e} absolute + relative{why}",
        detail=f"{len(scenario.steps)} steps of prefill, chunked prefill and decode against {whose}",
    )


def operators(engine: EngineUnderTest, reference: Reference, tolerances: Tolerances) -> GateResult:
    """Each layer's operator, with the graph's attributes, against the reference on the same inputs."""
    float_outputs = [name for name in names.OPERATOR_OUTPUTS if name != "code_cache_out"]
    quantile = 1.0 if tolerances.own_sets else tolerances.operator_quantile
    compare = SimpleCompareFunc(
        atol=tolerances.operator,
        rtol=tolerances.operator,
        check_error_stat={"": "elemwise", "output": "elemwise" if tolerances.own_sets else "quantile"},
        error_quantile=quantile,
        # Packed code bits are no numbers: another gate compares them.
        find_output_func=lambda name, *_: [name] if name in float_outputs else [],
    )
    failed, worst = [], 0.0
    for layer, calls in _by_layer(reference.calls).items():
        answers = _operator_answers(engine, reference, layer, calls, tolerances)
        runners = [KnownAnswers(answers, "reference", calls[0].inputs), _operator(engine, layer, calls)]
        results = Comparator.run(runners, data_loader=[call.inputs for call in calls])
        found = results[runners[1].name]
        for expected, actual in zip(results["reference"], found, strict=True):
            for name in float_outputs:
                error = np.abs(expected[name].astype(np.float64) - actual[name].astype(np.float64))
                worst = max(worst, float(np.quantile(error, quantile)) if error.size else 0.0)
        if not bool(Comparator.compare_accuracy(results, compare_func=compare)):
            failed.append(layer)
    return GateResult(
        gate=Gate.operators,
        outcome="failed" if failed else "passed",
        measured=f"outputs differ by {worst:.1e}" + (f" (layers {_few(failed)})" if failed else ""),
        bound=f"{tolerances.operator:.0e} absolute + relative",
        detail=f"{len(reference.calls)} calls of {len(_by_layer(reference.calls))} layers"
        + (", decode rows over their own sets" if tolerances.own_sets else ""),
    )


def _operator(engine: EngineUnderTest, layer: int, calls: list[OperatorCall], **changes: Any) -> BaseRunner:
    """The graph's operator, sparse from where the reference's calls are (`scenario.validated_config`)."""
    return engine.operator(layer, min_length=calls[0].attributes.min_length, **changes)


def _operator_answers(
    engine: EngineUnderTest, reference: Reference, layer: int, calls: list[OperatorCall], tolerances: Tolerances
) -> Iterator[Arrays]:
    if not tolerances.own_sets:
        yield from (reference.outputs(call) for call in calls)
        return
    with _operator(engine, layer, calls, scale=0.0) as probe:
        for call in calls:
            answer = reference.outputs(call)
            output = answer["output"].copy()
            for row in decode_rows(call.inputs):
                token = int(call.inputs["query_start"][row])
                chosen = attended_tokens(_output_of(probe), call.inputs, row)
                output[0, :, token] = attention_over(chosen, call.inputs, answer, row, call.attributes)
            yield answer | {"output": output}


def code_bits_written(engine: EngineUnderTest, reference: Reference, tolerances: Tolerances) -> GateResult:
    """Code bits that the operator writes, against float64 projections, away from zero and near it."""
    wrong = near_zero = near_zero_differ = total = 0
    for layer, calls in _by_layer(reference.calls).items():
        with _operator(engine, layer, calls) as runner:
            for call in calls:
                codes = written_codes(runner.infer(call.inputs)["code_cache_out"], call.inputs)
                bits, clear = reference.bits(call, tolerances.margins.projection)
                rank = bits.shape[-1]
                found = (codes[..., None] >> np.arange(rank - 1, -1, -1)) & 1 == 1
                wrong += int(((found != bits) & clear).sum())
                near_zero += int((~clear).sum())
                near_zero_differ += int(((found != bits) & ~clear).sum())
                total += bits.size
    return GateResult(
        gate=Gate.code_bits,
        outcome="failed" if wrong else "passed",
        measured=f"{wrong} of {total - near_zero} wrong ({wrong / max(1, total - near_zero):.2%})",
        bound="0",
        detail=f"{near_zero} bits within {tolerances.margins.projection:.0e} of zero, {near_zero_differ} of them differ",
    )


def selections(engine: EngineUnderTest, reference: Reference, tolerances: Tolerances) -> GateResult:
    """The sets that decode queries attend to, against the reference's in float64."""
    overlaps: list[float] = []
    wrong = 0
    for layer, calls in _by_layer(reference.calls).items():
        with _operator(engine, layer, calls, scale=0.0) as probe:
            for call in calls:
                for row, sets in reference.sets(call, tolerances.margins.score).items():
                    found = attended_tokens(_output_of(probe), call.inputs, row)
                    overlaps += _overlaps(found, sets.expected)
                    wrong += int(((found != sets.expected) & ~sets.excused).sum())
                    wrong += int((found.sum(-1) != sets.expected.sum(-1)).sum())
    if not overlaps:
        return GateResult(
            gate=Gate.selections, outcome="skipped", measured="-", bound="-",
            detail="no decode query within --max-seq-len leaves anything out",
        )  # fmt: skip
    return GateResult(
        gate=Gate.selections,
        outcome="failed" if wrong else "passed",
        measured=f"overlap {min(overlaps):.4f} least, {np.mean(overlaps):.4f} mean; {wrong} tokens wrong",
        bound="0 wrong",
        detail=f"{len(overlaps)} sets; tokens within {tolerances.margins.score:.0e} of the threshold may go either way",
    )


def _overlaps(found: Bools, expected: Bools) -> list[float]:
    shares: list[float] = ((found & expected).sum(-1) / np.maximum(1, (found | expected).sum(-1))).tolist()
    return shares


def _output_of(runner: BaseRunner) -> Callable[[Arrays], npt.NDArray[Any]]:
    return lambda inputs: np.asarray(runner.infer(inputs)["output"])


def greedy_text(open_dense: OpenSession, expected: GreedyText, tolerances: Tolerances, gate: Gate) -> GateResult:
    """Greedy tokens of the engine, its budget keeping everything, against those of another implementation."""
    found = generate_greedily(open_dense, expected.prompt).tokens
    pairs = zip(expected.tokens, found, strict=False)
    agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), len(expected.tokens))
    tied = agreed < len(expected.tokens) and expected.gap(agreed, found[agreed]) <= tolerances.tie
    whom = "transformers.generate" if gate is Gate.greedy else "ONNX Runtime"
    return GateResult(
        gate=gate,
        outcome="passed" if found == expected.tokens or tied else "failed",
        measured=f"{agreed} of {len(expected.tokens)} tokens agree" + (" up to a tie" if tied else ""),
        bound="all" + (f", ties within {tolerances.tie:.0e} of a logit excused" if tolerances.tie else ""),
        detail=f"prompt of {len(expected.prompt)} tokens, against {whom}",
    )


def generate_greedily(open_session: OpenSession, prompt: list[int], tokens: int = GREEDY_TOKENS) -> GreedyText:
    """Greedy tokens of a session behind the scheduler, with the logits they were chosen by."""
    session = _Listening(open_session())
    try:
        scheduler = Scheduler(session)
        scheduler.submit(prompt, SamplingParameters(max_tokens=tokens))
        found = []
        while not scheduler.idle:
            for event in scheduler.step():
                if event.error is not None:
                    raise event.error
                found.append(int(event.token or 0))
    finally:
        session.close()
    return GreedyText(prompt, found, np.concatenate(session.heard[-len(found) :]))


class _Listening(Session):
    """A session whose logits are kept."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.heard: list[Floats] = []

    @property
    def limits(self) -> SessionLimits:
        return self._session.limits

    def step(self, batch: StepBatch) -> Floats:
        self.heard.append(self._session.step(batch).copy())
        return self.heard[-1]

    def close(self) -> None:
        self._session.close()


def _by_layer(calls: Iterable[OperatorCall]) -> dict[int, list[OperatorCall]]:
    layers: dict[int, list[OperatorCall]] = {}
    for call in calls:
        layers.setdefault(call.layer, []).append(call)
    return layers


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (" ..." if len(numbers) > 4 else "")


def tolerances_of(backend: str, dtype: str) -> Tolerances:
    """Raises EngineError for a dtype that validation does not cover."""
    if (backend, dtype) not in TOLERANCES:
        covered = ", ".join(kind for runtime, kind in TOLERANCES if runtime == backend)
        raise EngineError(f"validation on {backend} covers {covered}; this engine is {dtype}")
    return TOLERANCES[backend, dtype]
