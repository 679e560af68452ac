"""The reference computed with PyTorch: transformers' own model, and the reference operator in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from socket_trt import names
from socket_trt.config import OperatorAttributes, attended_budget, code_bits
from socket_trt.engine.build import TORCH_DTYPES
from socket_trt.engine.manifest import EngineDirectory, Manifest
from socket_trt.models.checkpoint import load_config
from socket_trt.models.packed import Observer, PackedModel, empty_caches, freeze_rope
from socket_trt.reference import attended_set, collision_scores, gather_sequence, socket_attention
from socket_trt.reference.operator import append
from socket_trt.reference.selection import fixed_and_candidates
from socket_trt.runtime.session import StepBatch
from socket_trt.validation.reference import (
    GREEDY_TOKENS,
    Bools,
    ExpectedSet,
    Floats,
    GreedyText,
    OperatorCall,
    Reference,
    greedy_prompt,
)
from socket_trt.validation.runners import feed_dict
from socket_trt.validation.scenario import Scenario, validated_config
from socket_trt.validation.selection_probe import Arrays, decode_rows

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


# Float64 takes twice the memory and, on a CPU, about twice the time.
MOST_PARAMETERS_IN_FLOAT64 = 100_000_000


class TorchReference(Reference):
    """Computes each answer when it is asked for."""

    def __init__(self, model: PreTrainedModel, manifest: Manifest, scenario: Scenario) -> None:
        self._model, self._manifest, self._scenario = model, manifest, scenario
        self._calls = record_calls(model, manifest, scenario)

    @property
    def calls(self) -> Sequence[OperatorCall]:
        return self._calls

    def logits(self) -> list[Floats]:
        return self._logits

    @functools.cached_property
    def _logits(self) -> list[Floats]:
        return transformers_logits(self._model, self._scenario)

    def rounding(self) -> float:
        if self._model.num_parameters() > MOST_PARAMETERS_IN_FLOAT64:
            return 0.0
        exact = transformers_logits(copy.deepcopy(self._model).double(), self._scenario)
        return max(float(np.abs(a - b).max()) for a, b in zip(exact, self.logits(), strict=True))

    def outputs(self, call: OperatorCall) -> Arrays:
        inputs: Any = {name: torch.from_numpy(call.inputs[name]) for name in names.OPERATOR_INPUTS}
        outputs = socket_attention(**inputs, attributes=call.attributes)
        return {name: t.contiguous().numpy() for name, t in zip(names.OPERATOR_OUTPUTS, outputs, strict=True)}

    def bits(self, call: OperatorCall, margin: float) -> tuple[Bools, Bools]:
        tensors = _tensors(call, torch.float64)
        tokens = int(call.inputs["query_start"][-1])
        keys, planes = tensors["key"][0, :, :tokens].transpose(0, 1), tensors["planes"]
        projection = torch.einsum("thd,lrd->thlr", keys, planes)
        size = keys.norm(dim=-1)[..., None, None] * planes.norm(dim=-1)
        return (projection >= 0).numpy(), (projection.abs() > margin * size).numpy()

    def sets(self, call: OperatorCall, margin: float) -> dict[int, ExpectedSet]:
        rows = {row: _expected_set(call, row, margin) for row in decode_rows(call.inputs)}
        return {row: sets for row, sets in rows.items() if sets is not None}

    def greedy(self) -> GreedyText:
        prompt = greedy_prompt(self._manifest, self._scenario)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            result = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=GREEDY_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens: list[int] = result.sequences[0, len(prompt) :].tolist()
        return GreedyText(prompt, tokens, torch.stack(result.logits)[:, 0].float().numpy())


def transformers_logits(model: PreTrainedModel, scenario: Scenario) -> list[Floats]:
    """Logits [B, V] of every step, by transformers alone."""
    caches: dict[int, DynamicCache] = {}
    return [transformers_step(model, step, caches) for step in scenario.steps]


def transformers_step(model: PreTrainedModel, batch: StepBatch, caches: dict[int, DynamicCache]) -> Floats:
    """Logits of a step by transformers' own attention and cache, one row at a time: it knows nothing of SOCKET."""
    from transformers import DynamicCache

    rows = []
    for row in range(len(batch.past_length)):
        first, last = batch.query_start[row : row + 2]
        cache = caches.setdefault(row, DynamicCache(config=model.config))
        with torch.no_grad():
            ids = torch.from_numpy(batch.input_ids[first:last])[None].long()
            result = model(ids, None, None, cache)  # by position: transformers 5.24 renamed `past_key_values`
        rows.append(result.logits[0, batch.logits_indices[row] - first].float().numpy())
    return np.stack(rows)


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
    packed = PackedModel(model, validated_config(manifest), manifest.model.head_size)
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


def _tensors(call: OperatorCall, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs as tensors, floating point ones in `dtype`."""
    tensors = {name: torch.from_numpy(array) for name, array in call.inputs.items()}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def _expected_set(call: OperatorCall, row: int, margin: float) -> ExpectedSet | None:
    """Scores are computed in float64 from the caches as the reference leaves them; None where the row leaves nothing out."""
    tensors, attributes = _tensors(call, torch.float64), call.attributes
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
        return None
    threshold = scores[:, candidates].topk(budget, dim=-1).values[:, -1:]
    excused = candidates & ((scores - threshold).abs() <= margin * threshold.abs())
    return ExpectedSet(expected.numpy(), excused.numpy())
