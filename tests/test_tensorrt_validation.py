"""Validation of TensorRT engines, on a fake TensorRT: both runtimes and PyTorch's answers, computed or recorded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from socket_trt.cli.main import main
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import EngineError
from socket_trt.progress import Silent
from socket_trt.validation import validate
from socket_trt.validation.gates import TOLERANCES
from socket_trt.validation.reference import REFERENCE_FILE, RecordedReference
from socket_trt.validation.report import Gate, ValidationReport
from socket_trt.validation.scenario import make_scenario
from socket_trt.validation.torch_reference import TorchReference, load_model
from socket_trt.validation.validate import record_answers, validate_engine
from tests.tensorrt_fixtures import FakeMachine

MARGINS = TOLERANCES["tensorrt", "float16"].margins


def outcomes(report: ValidationReport) -> dict[Gate, str]:
    return {gate.gate: gate.outcome for gate in report.gates}


def test_recorded_answers_are_those_that_pytorch_gives(machine: FakeMachine) -> None:
    machine.install()
    engine = machine.compiled()
    record_answers(engine, Silent())
    scenario = make_scenario(engine.manifest)
    recorded = RecordedReference(engine, scenario, MARGINS, 0)
    computed = TorchReference(load_model(engine), engine.manifest, scenario)
    assert len(recorded.calls) == len(computed.calls) == 2 * len(scenario.steps)
    for one, other in zip(recorded.calls, computed.calls, strict=True):
        assert (one.layer, one.step, one.attributes) == (other.layer, other.step, other.attributes)
        for mine, theirs in ((one.inputs, other.inputs), (recorded.outputs(one), computed.outputs(other))):
            assert list(mine) == list(theirs)
            for name in mine:
                assert np.array_equal(mine[name], theirs[name]), name
        for mine_bits, their_bits in zip(recorded.bits(one, 1e-5), computed.bits(other, 1e-5), strict=True):
            assert np.array_equal(mine_bits, their_bits)
        sets, their_sets = recorded.sets(one, 2e-2), computed.sets(other, 2e-2)
        assert list(sets) == list(their_sets)
        for row in sets:
            assert np.array_equal(sets[row].expected, their_sets[row].expected)
            assert np.array_equal(sets[row].excused, their_sets[row].excused)
    assert all(np.array_equal(a, b) for a, b in zip(recorded.logits(), computed.logits(), strict=True))
    assert recorded.greedy().tokens == computed.greedy().tokens
    assert (engine.path / REFERENCE_FILE).stat().st_size < 2 << 20


@pytest.mark.parametrize("recorded", [True, False])
def test_a_right_engine_passes_every_gate(recorded: bool, machine: FakeMachine) -> None:
    machine.install()
    engine = machine.compiled()
    if recorded:
        record_answers(engine, Silent())
    report = validate_engine(engine, Silent())
    assert outcomes(report) == dict.fromkeys(Gate, "passed"), report
    assert report.versions["tensorrt"] == "8.6.0"


def test_without_pytorch_or_a_recording_only_the_runtimes_are_compared(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.install()
    engine = machine.compiled()
    monkeypatch.setattr(validate, "_TORCH_PACKAGES", ("no_such_package",))
    report = validate_engine(engine, Silent())
    compared = {gate for gate, outcome in outcomes(report).items() if outcome == "passed"}
    assert compared == {Gate.runtimes, Gate.greedy_runtimes}
    assert all("--record" in gate.detail for gate in report.gates if gate.outcome == "skipped")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("scale", 0.1, {Gate.whole_model, Gate.operators, Gate.runtimes}),
        ("temperature", 0.9, {Gate.selections}),
        ("window", 1, {Gate.selections}),
        ("budget_permille", 90, {Gate.selections}),
    ],
)
def test_a_plan_that_computes_something_else_is_found(
    name: str, value: float, expected: set[Gate], machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is planted where TensorRT parses, so that only the plans have it."""
    trt = machine.install()
    engine = machine.compiled()
    record_answers(engine, Silent())

    def plant(data: bytes) -> bytes:
        model = onnx.load_model_from_string(data)
        for node in model.graph.node:
            for attribute in node.attribute:
                probe = name == "scale" and helper.get_attribute_value(attribute) == 0.0
                if node.op_type == "SocketAttention" and attribute.name == name and not probe:
                    attribute.CopyFrom(helper.make_attribute(name, value))
        return model.SerializeToString()

    stock = trt.OnnxParser

    def parser(network: object, logger: object) -> object:
        found = stock(network, logger)
        parse = found.parse
        found.parse = lambda data, **options: parse(plant(data), **options)
        return found

    monkeypatch.setattr(trt, "OnnxParser", parser)
    failed = {gate for gate, outcome in outcomes(validate_engine(engine, Silent())).items() if outcome == "failed"}
    assert expected <= failed


def test_recordings_of_something_else_are_refused(machine: FakeMachine) -> None:
    machine.install()
    engine = machine.compiled()
    record_answers(engine, Silent(), seed=1)
    with pytest.raises(EngineError, match="another seed"):
        validate_engine(engine, Silent())
    (engine.path / REFERENCE_FILE).write_bytes(b"no arrays")
    with pytest.raises(EngineError, match="not a recorded reference"):
        validate_engine(engine, Silent())


def test_commands(machine: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.install()
    engine = machine.compiled()
    for arguments, status in ((["--record"], 0), (["--json"], 0)):
        with pytest.raises(SystemExit) as exit_:
            main(["validate", str(engine.path), *arguments])
        assert exit_.value.code == status
    assert "reference.npz" in capsys.readouterr().out
    assert EngineDirectory.open(engine.path)
    assert json.loads((Path(engine.path) / "validation.json").read_text())["gates"]
