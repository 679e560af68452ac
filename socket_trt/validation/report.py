"""What validation found: one result a gate, written to validation.json."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from socket_trt.errors import EngineError

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

    @classmethod
    def last(cls, directory: Path) -> ValidationReport | None:
        """The report in an engine directory; None where there is none.  Raises EngineError where it cannot be read."""
        file = directory / VALIDATION_FILE
        if not file.is_file():
            return None
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError:
            raise EngineError(f"{file}: not a report of this release; run socket-trt validate {directory}") from None

    @property
    def passed(self) -> bool:
        return all(gate.outcome != "failed" for gate in self.gates)
