"""The five gates of validation; each compares one thing and returns a `GateResult`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator, SimpleCompareFunc

from socket_trt import names
from socket_trt.config import INT32_MAX, OperatorAttributes, attended_budget, code_bits
from socket_trt.errors import EngineError
from socket_trt.reference import attended_set, collision_scores, gather_sequence
from socket_trt.reference.selection import fixed_and_candidates
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import Scheduler
from socket_trt.runtime.session import Session
from socket_trt.validation.report import Gate, GateResult
from socket_trt.validation.runners import (
    ReferenceOperatorRunner,
    SessionRunner,
    TransformersRunner,
    feed_dict,
    operator_runner,
)
from socket_trt.validation.scenario import Scenario
from socket_trt.validation.selection_probe import Arrays, attended_tokens, decode_rows, written_codes
from socket_trt.validation.variants import EngineGraph

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """Bounds of the gates for one dtype.

    logits          absolute and relative, on logits
    operator        absolute and relative, on an operator's outputs; `operator_quantile` of them must hold it (a top-M
                    set may differ where two scores tie, and then one head's output does)
    projection      |w . k| / (|w| |k|) below this may fall on either side of zero
    score           scores this close to the threshold, relative, may be chosen or not
    tie             greedy tokens may differ where the two best logits are closer than this; 0: never
    """

    logits: float
    operator: float
    projection: float
    score: float
    tie: float
    operator_quantile: float = 0.99


TOLERANCES = {
    "float32": Tolerances(logits=5e-5, operator=2e-5, projection=1e-6, score=1e-5, tie=0.0),
    "float16": Tolerances(logits=3e-2, operator=3e-3, projection=1e-6, score=1e-5, tie=2e-2),
}


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """One operator's inputs in one step, as the PyTorch model gave them, and the attributes they call for."""

    layer: int
    step: int
    inputs: Arrays
    attributes: OperatorAttributes

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The inputs as tensors, floating point ones in `dtype`."""
        tensors = {name: torch.from_numpy(array) for name, array in self.inputs.items()}
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def whole_model(
    open_dense: Callable[[], Session], model: PreTrainedModel, scenario: Scenario, tolerances: Tolerances
) -> GateResult:
    """Gate 1: logits of the engine with a budget that keeps everything, against transformers' own model."""
    runners = [TransformersRunner(model, "transformers"), SessionRunner(open_dense, "engine")]
    results = Comparator.run(runners, data_loader=[feed_dict(step) for step in scenario.steps])
    compare = SimpleCompareFunc(atol=tolerances.logits, rtol=tolerances.logits, check_error_stat="elemwise")
    outcome = Comparator.compare_accuracy(results, compare_func=compare)
    pairs = zip(results["transformers"], results["engine"], strict=True)
    worst = max(float(np.abs(a[names.LOGITS] - b[names.LOGITS]).max()) for a, b in pairs)
    return GateResult(
        gate=Gate.whole_model,
        outcome="passed" if bool(outcome) else "failed",
        measured=f"logits differ by {worst:.1e}",
        bound=f"{tolerances.logits:.0e} absolute + relative",
        detail=f"{len(scenario.steps)} steps of prefill, chunked prefill and decode against transformers",
    )


def operators(graph: EngineGraph, calls: list[OperatorCall], tolerances: Tolerances) -> GateResult:
    """Gate 2: each layer's operator, with the graph's attributes and body, against the reference on the same inputs."""
    float_outputs = [name for name in names.OPERATOR_OUTPUTS if name != "code_cache_out"]
    compare = SimpleCompareFunc(
        atol=tolerances.operator,
        rtol=tolerances.operator,
        check_error_stat={"": "elemwise", "output": "quantile"},
        error_quantile=tolerances.operator_quantile,
        # Packed code bits are no numbers: gate 3 compares them.
        find_output_func=lambda name, *_: [name] if name in float_outputs else [],
    )
    failed, worst = [], 0.0
    for layer, of_layer in _by_layer(calls).items():
        runners = [
            ReferenceOperatorRunner(of_layer[0].attributes, of_layer[0].inputs, "reference"),
            operator_runner(graph.operator(layer), "engine"),
        ]
        results = Comparator.run(runners, data_loader=[call.inputs for call in of_layer])
        for expected, actual in zip(results["reference"], results["engine"], strict=True):
            for name in float_outputs:
                error = np.abs(expected[name].astype(np.float64) - actual[name].astype(np.float64))
                worst = max(worst, float(np.quantile(error, tolerances.operator_quantile)) if error.size else 0.0)
        if not bool(Comparator.compare_accuracy(results, compare_func=compare)):
            failed.append(layer)
    return GateResult(
        gate=Gate.operators,
        outcome="failed" if failed else "passed",
        measured=f"outputs differ by {worst:.1e}" + (f" (layers {_few(failed)})" if failed else ""),
        bound=f"{tolerances.operator:.0e} absolute + relative",
        detail=f"{len(calls)} calls of {len(_by_layer(calls))} layers",
    )


def code_bits_written(graph: EngineGraph, calls: list[OperatorCall], tolerances: Tolerances) -> GateResult:
    """Gate 3: code bits that the operator writes, against float64 projections, away from zero and near it."""
    wrong = near_zero = near_zero_differ = total = 0
    for layer, of_layer in _by_layer(calls).items():
        with operator_runner(graph.operator(layer)) as runner:
            for call in of_layer:
                codes = written_codes(runner.infer(call.inputs)["code_cache_out"], call.inputs)
                bits, clear = _expected_bits(call, tolerances.projection)
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
        detail=f"{near_zero} bits within {tolerances.projection:.0e} of zero, {near_zero_differ} of them differ",
    )


def selections(graph: EngineGraph, calls: list[OperatorCall], tolerances: Tolerances) -> GateResult:
    """Gate 4: the sets that decode queries attend to, against the reference's in float64."""
    overlaps, wrong, heads_seen = [], 0, 0
    for layer, of_layer in _by_layer(calls).items():
        with operator_runner(graph.operator(layer, scale=0.0)) as runner:

            def run(inputs: Arrays, runner: OnnxrtRunner = runner) -> npt.NDArray[Any]:
                return np.asarray(runner.infer(inputs)["output"])

            for call in of_layer:
                for row in decode_rows(call.inputs):
                    expected, excused, selects = _expected_set(call, row, tolerances.score)
                    if not selects:
                        continue
                    found = attended_tokens(run, call.inputs, row)
                    common = (found & expected).sum(-1) / np.maximum(1, (found | expected).sum(-1))
                    overlaps += common.tolist()
                    wrong += int(((found != expected) & ~excused).sum())
                    wrong += int((found.sum(-1) != expected.sum(-1)).sum())
                    heads_seen += len(found)
    if not heads_seen:
        return GateResult(
            gate=Gate.selections, outcome="skipped", measured="-", bound="-",
            detail="no decode query within --max-seq-len leaves anything out",
        )  # fmt: skip
    return GateResult(
        gate=Gate.selections,
        outcome="failed" if wrong else "passed",
        measured=f"overlap {min(overlaps):.4f} least, {np.mean(overlaps):.4f} mean; {wrong} tokens wrong",
        bound="0 wrong",
        detail=f"{heads_seen} sets; tokens within {tolerances.score:.0e} of the threshold may go either way",
    )


def greedy_text(
    open_dense: Callable[[], Session],
    model: PreTrainedModel,
    prompt: list[int],
    new_tokens: int,
    tolerances: Tolerances,
) -> GateResult:
    """Gate 5: greedy tokens of the engine, its budget keeping everything, against transformers' generate."""
    with torch.no_grad():
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        generated = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    expected = generated[0, len(prompt) :].tolist()
    session = open_dense()
    try:
        scheduler = Scheduler(session)
        scheduler.submit(prompt, SamplingParameters(max_tokens=new_tokens))
        found = []
        while not scheduler.idle:
            found += [event.token for event in scheduler.step() if event.token is not None]
    finally:
        session.close()
    agreed = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(expected))
    tied = (
        agreed < len(expected)
        and _gap(model, prompt + expected[:agreed], expected[agreed], found[agreed]) <= tolerances.tie
    )
    return GateResult(
        gate=Gate.greedy,
        outcome="passed" if found == expected or tied else "failed",
        measured=f"{agreed} of {len(expected)} tokens agree" + (" up to a tie" if tied else ""),
        bound="all" + (f", ties within {tolerances.tie:.0e} of a logit excused" if tolerances.tie else ""),
        detail=f"prompt of {len(prompt)} tokens, against transformers.generate",
    )


def keeps_everything(graph: EngineGraph) -> bytes:
    """The engine's graph with a budget no sequence exceeds: its sparse path computes dense attention."""
    return graph.with_attributes(budget_tokens=INT32_MAX, min_length=0)


def _by_layer(calls: list[OperatorCall]) -> dict[int, list[OperatorCall]]:
    layers: dict[int, list[OperatorCall]] = {}
    for call in calls:
        layers.setdefault(call.layer, []).append(call)
    return layers


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (" ..." if len(numbers) > 4 else "")


def _expected_bits(call: OperatorCall, margin: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Sign of every projection of the step's keys in float64, and whether it is clear of zero: [tokens, Hkv, L, R]."""
    tensors = call.tensors(torch.float64)
    tokens = int(call.inputs["query_start"][-1])
    keys, planes = tensors["key"][0, :, :tokens].transpose(0, 1), tensors["planes"]
    projection = torch.einsum("thd,lrd->thlr", keys, planes)
    size = keys.norm(dim=-1)[..., None, None] * planes.norm(dim=-1)
    return (projection >= 0).numpy(), (projection.abs() > margin * size).numpy()


def _expected_set(
    call: OperatorCall, row: int, margin: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], bool]:
    """The reference's set of a decode row, the tokens whose score is too close to the threshold to tell, and whether the
    row selects at all: bool [Hq, T] twice.  Scores are computed in float64 from the caches as the reference leaves them.
    """
    from socket_trt.reference.operator import append

    tensors, attributes = call.tensors(torch.float64), call.attributes
    past, start = call.inputs["past_length"].tolist(), call.inputs["query_start"].tolist()
    planes, bits = tensors["planes"], code_bits(call.inputs["planes"].shape[1])
    given = {name: tensors[name] for name in names.OPERATOR_INPUTS[1:8]}
    caches = append(**given, past=past, start=start, planes=planes)
    length = past[row] + 1
    cached = gather_sequence(*caches, tensors["page_table"][row], length, bits)
    query = tensors["query"][0, :, start[row] : start[row] + 1]
    expected = attended_set(query, cached.codes, cached.norms, planes, past[row], attributes)[:, 0]
    scores = collision_scores(
        query[:, 0], cached.codes, cached.norms, planes, attributes.temperature, attributes.selection
    )
    _, candidates = fixed_and_candidates(length, attributes, scores.device)
    budget = attended_budget(length, attributes.budget_tokens, attributes.budget_permille)
    if length <= attributes.min_length or int(candidates.sum()) <= budget or budget == 0:
        return expected.numpy(), torch.zeros_like(expected).numpy(), False
    threshold = scores[:, candidates].topk(budget, dim=-1).values[:, -1:]
    excused = candidates & ((scores - threshold).abs() <= margin * threshold.abs())
    return expected.numpy(), excused.numpy(), True


def _gap(model: PreTrainedModel, tokens: list[int], one: int, other: int) -> float:
    """How far apart the model's logits of two next tokens are."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].float()
    return float((logits[one] - logits[other]).abs())


def check_supported_dtype(dtype: str) -> Tolerances:
    if dtype not in TOLERANCES:
        raise EngineError(f"validation on ONNX Runtime covers {', '.join(TOLERANCES)}; this engine is {dtype}")
    return TOLERANCES[dtype]
