"""Validation passes on what is right, and fails on what was planted wrong, in the gate that is meant to see it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from socket_trt.config import SocketConfig
from socket_trt.engine.manifest import MANIFEST_FILE, EngineDirectory
from socket_trt.errors import CheckpointError, EngineError, GraphError
from socket_trt.progress import Silent
from socket_trt.validation.report import Gate, ValidationReport
from socket_trt.validation.scenario import first_sparse_length, make_scenario
from socket_trt.validation.validate import validate_engine
from socket_trt.weights import sha256_of
from tests.engines import tiny_engine

WHOLE, OPERATOR, BITS, SELECTIONS, GREEDY = range(5)
Plant = Callable[[onnx.ModelProto], None]


def copy_engine(origin: Path, target: Path, plant: Plant | None = None) -> EngineDirectory:
    """A copy of an engine directory, with a fault planted in its graph and the manifest none the wiser."""
    shutil.copytree(origin, target)
    if plant is not None:
        graph = target / "model.onnx"
        model = onnx.load(str(graph), load_external_data=False)
        plant(model)
        graph.write_bytes(model.SerializeToString())
        manifest = json.loads((target / MANIFEST_FILE).read_text())
        manifest["graph"]["sha256"] = sha256_of(graph)
        (target / MANIFEST_FILE).write_text(json.dumps(manifest))
    return EngineDirectory.open(target)


def outcomes(report: ValidationReport) -> list[str]:
    return [gate.outcome for gate in report.gates]


def attribute(name: str, change: Callable[[float], float]) -> Plant:
    def plant(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for found in node.attribute:
                if node.op_type == "SocketAttention" and found.name == name:
                    value = change(helper.get_attribute_value(found))
                    found.CopyFrom(helper.make_attribute(name, value))

    return plant


def function_node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    (function,) = model.functions
    return next(node for node in function.node if output in node.output)


def reversed_bits(model: onnx.ModelProto) -> None:
    """The first plane becomes the least significant bit, in writing codes and in reading them."""
    power = function_node(model, function_node(model, "plane_places").input[0])
    exponent = function_node(model, function_node(model, power.input[1]).input[0])
    assert exponent.op_type == "Sub"
    exponent.op_type = "Identity"  # (R - 1) - r becomes r
    del exponent.input[0]


def swapped_words(model: onnx.ModelProto) -> None:
    """Big-endian words: consistent in themselves, and not what the layout says."""
    (function,) = model.functions
    position = next(i for i, node in enumerate(function.node) if "word_places" in node.output)
    function.node[position].output[0] = "little_endian_places"
    order = helper.make_node("Constant", [], ["big_endian_order"], value_ints=[3, 2, 1, 0])
    gather = helper.make_node("Gather", ["little_endian_places", "big_endian_order"], ["word_places"])
    nodes = [*function.node[: position + 1], order, gather, *function.node[position + 1 :]]
    del function.node[:]
    function.node.extend(nodes)


def other_weight(model: onnx.ModelProto) -> None:
    """Two projections of the same shape change places."""
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name.endswith("layers.0.mlp.gate_proj.weight"):
                node.input[i] = name.replace("gate_proj", "up_proj")


PLANTED = {
    "bit order": (reversed_bits, {BITS, SELECTIONS}),
    "word order": (swapped_words, {BITS, SELECTIONS}),
    "temperature": (attribute("temperature", lambda t: 2 * t), {OPERATOR, SELECTIONS}),
    "window": (attribute("window", lambda _: 1), {OPERATOR, SELECTIONS}),
    "sink": (attribute("sink", lambda _: 0), {OPERATOR, SELECTIONS}),
    "budget": (attribute("budget_permille", lambda b: b - 10), {SELECTIONS}),
    "selection": (attribute("selection", lambda s: 1 - s), {OPERATOR, SELECTIONS}),
    "scale": (attribute("scale", lambda s: 1.1 * s), {WHOLE, OPERATOR}),
    "sliding window": (attribute("sliding_window", lambda _: 30), {WHOLE, OPERATOR}),
    "softcap": (attribute("softcap", lambda _: 2.0), {WHOLE, OPERATOR}),
    "weight": (other_weight, {WHOLE}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    plant, expected = PLANTED[name]
    report = validate_engine(copy_engine(tiny_engine(), tmp_path / "engine", plant), Silent())
    failed = {number for number, outcome in enumerate(outcomes(report)) if outcome == "failed"}
    assert not report.passed
    assert expected <= failed, f"gates {sorted(expected)} should have failed, {sorted(failed)} did"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("selection", ["query_head", "kv_head"])
def test_a_right_engine_passes(dtype: str, selection: str, tmp_path: Path) -> None:
    engine = copy_engine(tiny_engine(dtype, selection=selection), tmp_path / "engine")
    report = validate_engine(engine, Silent(), seed=1)
    assert outcomes(report) == ["passed"] * 5
    written = ValidationReport.model_validate_json((tmp_path / "engine" / "validation.json").read_text())
    assert written == report
    assert written.engine_graph_sha256 == engine.manifest.graph.sha256


def test_sixteen_bit_codes(tmp_path: Path) -> None:
    engine = copy_engine(tiny_engine(planes=10), tmp_path / "engine")
    assert outcomes(validate_engine(engine, Silent())) == ["passed"] * 5


def test_attention_is_compared_sparse_below_the_length_from_which_it_is(tmp_path: Path) -> None:
    """And a fault in it is found there."""
    engine = copy_engine(tiny_engine(min_length=400), tmp_path / "engine")
    report = validate_engine(engine, Silent())
    assert set(outcomes(report)) == {"passed"}
    assert max(make_scenario(engine.manifest).lengths) < 400
    faulty = copy_engine(
        tiny_engine(min_length=400), tmp_path / "faulty", attribute("window", lambda window: window + 1)
    )
    found = {gate.gate: gate.outcome for gate in validate_engine(faulty, Silent()).gates}
    assert found[Gate.selections] == "failed"


def test_a_dense_engine_selects_nothing(tmp_path: Path) -> None:
    from socket_trt.config import AttentionKind

    engine = copy_engine(tiny_engine(attention=AttentionKind.dense), tmp_path / "engine")
    report = validate_engine(engine, Silent())
    assert outcomes(report) == ["passed", "passed", "passed", "skipped", "passed"]
    assert report.passed


def test_sequences_too_short_to_be_sparse_are_said_to_be(tmp_path: Path) -> None:
    engine = copy_engine(tiny_engine(budget_tokens=2000), tmp_path / "engine")
    report = validate_engine(engine, Silent())
    assert report.gates[SELECTIONS].outcome == "skipped"
    assert "max-seq-len" in report.gates[SELECTIONS].detail


def test_embedded_weights(tmp_path: Path) -> None:
    engine = copy_engine(tiny_engine(weights="embedded"), tmp_path / "engine")
    assert validate_engine(engine, Silent()).passed


def test_a_changed_graph_is_refused(tmp_path: Path) -> None:
    engine = copy_engine(tiny_engine(), tmp_path / "engine")
    with (tmp_path / "engine" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(EngineError, match="changed since it was built"):
        validate_engine(engine, Silent())


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    engine = copy_engine(tiny_engine(), tmp_path / "engine")
    path = tmp_path / "engine" / "checkpoint" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed since the engine was built"):
        validate_engine(engine, Silent())
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        validate_engine(engine, Silent())


def test_a_directory_that_cannot_be_written_is_found_before_the_gates_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = copy_engine(tiny_engine(), tmp_path / "engine")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != engine.path)  # as on a read-only mount
    monkeypatch.setattr("socket_trt.validation.validate.make_scenario", lambda *_: pytest.fail("the gates began"))
    with pytest.raises(EngineError, match="cannot be written; mount it writable"):
        validate_engine(engine, Silent())


def test_a_graph_without_its_operators_is_refused(tmp_path: Path) -> None:
    def drop(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "SocketAttention")
        node.op_type = "Other"

    with pytest.raises(GraphError, match="1 SocketAttention nodes for 2 layers"):
        validate_engine(copy_engine(tiny_engine(), tmp_path / "engine", drop), Silent())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SocketConfig(min_length=0), 128 + 128 + 1024 + 1),
        (SocketConfig(min_length=0, sink=8, window=8, budget_tokens=0, budget_permille=100), 19),
        (SocketConfig(), 32769),
        (SocketConfig(min_length=5000), 5001),
        (SocketConfig(min_length=0, sink=0, window=1, budget_tokens=0, budget_permille=0), 2),
        (SocketConfig(budget_permille=1000), None),
    ],
)
def test_the_first_sparse_length(config: SocketConfig, expected: int | None) -> None:
    found = first_sparse_length(config)
    assert found == expected
    if found is not None:
        fixed = config.sink + config.window
        assert found - fixed > config.budget(found)
        assert found - 1 <= config.min_length or found - 1 - fixed <= config.budget(found - 1)


def test_the_scenario_covers_prefill_chunks_and_mixed_steps() -> None:
    manifest = EngineDirectory.open(tiny_engine()).manifest
    scenario = make_scenario(manifest)
    counts = [np.diff(step.query_start).tolist() for step in scenario.steps]
    assert counts[0][0] > 1
    assert counts[0][1] > 1
    assert counts[1][0] > 1
    assert counts[1][1] == 1  # a prefill chunk beside a decode row
    assert counts[2:] == [[1, 1]] * 4
    used = [page for row in scenario.steps[0].page_table for page in row if page]
    assert len(used) == len(set(used))
    alone = make_scenario(manifest.model_copy(update={"max_batch_size": 1}))
    assert all(len(step.past_length) == 1 for step in alone.steps)
