"""What validation found: one result a gate, written to validation.json."""

from __future__ import annotations

import enum
from typing import Literal

from pydantic import BaseModel

VALIDATION_FILE = "validation.json"

Outcome = Literal["passed", "failed", "skipped"]


class Gate(str, enum.Enum):
    """What validation compares, in the order of the report."""

    whole_model = "whole model, budget keeps everything"
    operators = "each layer's operator, sparse"
    code_bits = "code bits"
    selections = "selections"
    greedy = "greedy tokens, budget keeps everything"
    runtimes = "TensorRT and ONNX Runtime, budget keeps everything"
    greedy_runtimes = "greedy tokens of TensorRT and ONNX Runtime"


class GateResult(BaseModel):
    """One gate: what was compared, the figure that decides, and the bound it was held to."""

    gate: Gate
    outcome: Outcome
    measured: str
    bound: str
    detail: str = ""


class ValidationReport(BaseModel):
    """All gates of one engine directory, and with what they were run."""

    engine_graph_sha256: str
    model: str
    family: str
    dtype: str
    attention: str
    versions: dict[str, str]
    sequence_lengths: list[int]
    seconds: float
    gates: list[GateResult]

    @property
    def passed(self) -> bool:
        return all(gate.outcome != "failed" for gate in self.gates)
