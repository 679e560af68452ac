"""Engine directories: what the build writes, what it refuses, and that it leaves nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

from socket_trt import names
from socket_trt.config import INT32_MAX, AttentionKind, SocketConfig
from socket_trt.engine import build as build_module
from socket_trt.engine.build import BuildOptions, build_engine
from socket_trt.engine.manifest import MANIFEST_FILE, EngineDirectory
from socket_trt.errors import CheckpointError, ConfigError, EngineError
from socket_trt.models.checkpoint import resolve_model
from socket_trt.progress import Silent
from tests.engines import MAX_SEQ_LEN, SOCKET, tiny_engine
from tests.families import save_checkpoint


def build(output: Path, model: str = "tiny", **options: object) -> Path:
    build_engine(resolve_model(model), output, BuildOptions(SOCKET, **options), Silent())  # type: ignore[arg-type]
    return output


def test_what_an_engine_directory_holds() -> None:
    directory = tiny_engine()
    assert {file.name for file in directory.iterdir()} >= {
        "model.onnx",
        "build.json",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    engine = EngineDirectory.open(directory)
    engine.check()
    manifest = engine.manifest
    assert manifest.socket == SOCKET
    assert manifest.max_seq_len == MAX_SEQ_LEN
    assert manifest.limits().num_pages == 1 + 8 * MAX_SEQ_LEN // 16
    assert manifest.limits(7).num_pages == 7
    assert {"socket-trt", "python", "onnx", "torch", "transformers"} <= set(manifest.versions)
    assert manifest.weights.files["model.safetensors"].sha256
    assert len(manifest.weights.tensors) == 21
    per_page = 2 * (2 * 16 * (2 * 64 + 1) * 4 + 2 * 60 * 4 * 4)  # layers x (keys, values, norms; codes)
    assert manifest.cache_bytes_per_page() == per_page


def test_the_graph_has_the_agreed_interface() -> None:
    manifest = EngineDirectory.open(tiny_engine()).manifest
    layers = range(2)
    assert [t.name for t in manifest.graph.inputs] == [
        *("input_ids", "position_ids", "logits_indices", "page_table", "past_length", "query_start"),
        *(f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value", "code", "norm")),
    ]
    assert [t.name for t in manifest.graph.outputs] == [
        "logits",
        *(f"present.{i}.{kind}" for i in layers for kind in ("key", "value", "code", "norm")),
    ]
    by_name = {t.name: (t.dtype, t.shape) for t in [*manifest.graph.inputs, *manifest.graph.outputs]}
    assert by_name["input_ids"] == ("int32", ["tokens"])
    assert by_name["page_table"] == ("int32", ["sequences", "pages_per_sequence"])
    assert by_name["query_start"] == ("int32", ["sequences + 1"])
    assert by_name["past_key_values.1.key"] == ("float", ["pages", 2, 16, 64])
    assert by_name["present.0.code"] == ("int32", ["pages", 2, 60, 4])
    assert by_name["present.0.norm"] == ("float", ["pages", 2, 16])
    assert by_name["logits"] == ("float", ["sequences", 260])


@pytest.mark.parametrize("opset", [17, 20, 23])
def test_opsets(opset: int) -> None:
    graph = tiny_engine(opset=opset) / "model.onnx"
    model = onnx.load(str(graph), load_external_data=False)
    assert {entry.version for entry in model.opset_import if entry.domain == ""} == {opset}
    assert {entry.version for entry in model.functions[0].opset_import if entry.domain == ""} == {opset}
    assert sum(node.op_type == names.OPERATOR for node in model.graph.node) == 2
    if opset == 17:
        assert model.ir_version == 8
        reductions = [node for node in model.graph.node if node.op_type == "ReduceMean"]
        assert reductions
        assert all(len(node.input) == 1 for node in reductions)
        assert all("axes" in {a.name for a in node.attribute} for node in reductions)


def test_weights_are_named_as_in_the_checkpoint_and_stay_there() -> None:
    model = onnx.load(str(tiny_engine() / "model.onnx"), load_external_data=False)
    external = {i.name: {e.key: e.value for e in i.external_data} for i in model.graph.initializer if i.external_data}
    tensors = EngineDirectory.open(tiny_engine()).manifest.weights.tensors
    assert set(external) == set(tensors)
    assert "model.layers.0.self_attn.q_proj.weight" in external
    for name, location in tensors.items():
        assert external[name] == {
            "location": location.file,
            "offset": str(location.offset),
            "length": str(location.length),
        }


def test_embedded_weights_stand_beside_the_graph() -> None:
    directory = tiny_engine(weights="embedded")
    onnx.checker.check_model(str(directory / "model.onnx"))  # finds them where ONNX looks for them
    manifest = EngineDirectory.open(directory).manifest
    assert list(manifest.weights.files) == ["model.onnx.data"]
    assert (directory / "model.onnx.data").stat().st_size >= 1_800_000


def test_a_dense_engine_is_the_same_graph_with_min_length_at_its_maximum() -> None:
    model = onnx.load(str(tiny_engine(attention=AttentionKind.dense) / "model.onnx"), load_external_data=False)
    found = [a.i for node in model.graph.node for a in node.attribute if a.name == "min_length"]
    assert found == [INT32_MAX, INT32_MAX]


def test_graph_only_writes_no_weights(tmp_path: Path) -> None:
    directory = build(tmp_path / "engine", graph_only=True)
    assert not list(directory.rglob("*.safetensors"))
    engine = EngineDirectory.open(directory)
    assert engine.manifest.weights.mode == "absent"
    with pytest.raises(EngineError, match="--graph-only"):
        engine.check()


def test_a_bfloat16_graph(tmp_path: Path) -> None:
    manifest = EngineDirectory.open(build(tmp_path / "engine", dtype="bfloat16", graph_only=True)).manifest
    dtypes = {t.name: t.dtype for t in [*manifest.graph.inputs, *manifest.graph.outputs]}
    assert dtypes["past_key_values.0.key"] == "bfloat16"
    assert dtypes["present.1.code"] == "int32"
    assert dtypes["logits"] == "float"
    assert {location.dtype for location in manifest.weights.tensors.values()} == {"BF16"}


def test_builds_are_deterministic(tmp_path: Path) -> None:
    first, second = build(tmp_path / "a"), build(tmp_path / "b")
    for file in ("model.onnx", "checkpoint/model.safetensors", "tokenizer.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    other = build(tmp_path / "c", seed=1)
    assert (first / "checkpoint/model.safetensors").read_bytes() != (
        other / "checkpoint/model.safetensors"
    ).read_bytes()


def test_an_existing_output_is_kept_without_force(tmp_path: Path) -> None:
    output = build(tmp_path / "engine")
    before = (output / MANIFEST_FILE).read_bytes()
    with pytest.raises(EngineError, match="exists; give --force"):
        build(output)
    assert (output / MANIFEST_FILE).read_bytes() == before
    build(output, force=True, max_seq_len=100)
    assert EngineDirectory.open(output).manifest.max_seq_len == 100
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_force_replaces_nothing_but_engine_directories(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(EngineError, match="is no engine directory"):
        build(tmp_path, force=True)
    with pytest.raises(EngineError, match="is no engine directory"):
        build(tmp_path / "thesis.tex", force=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    empty = tmp_path / "empty"
    empty.mkdir()
    build(empty, force=True)


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="cannot be written"):
        build(tmp_path / "file" / "engine")


@pytest.mark.parametrize("failure", [RuntimeError("boom"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_what_was_there(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "engine"
    shutil.copytree(tiny_engine(), output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(build_module, "save_graph", fail)
    expected = EngineError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        build(output, force=True)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "no bfloat16"),
        ({"graph_only": True, "weights": "embedded"}, "leave one of them out"),
        ({"max_batch_size": 0}, "at least one"),
        ({"max_seq_len": 0}, "takes 1 to 8192"),
        ({"max_seq_len": 8193}, "takes 1 to 8192"),
        ({"opset": 24}, "17 to 23"),
    ],
)
def test_options_that_contradict(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tmp_path / "engine", **options)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_with_other_tensors(tmp_path: Path) -> None:
    checkpoint = save_checkpoint("llama3", tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"lacks model.layers.2"):
        build(tmp_path / "engine", str(checkpoint))
    (checkpoint / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"the model's configuration wants \[64, 96\]"):
        build(tmp_path / "engine", str(checkpoint))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_with_a_tokenizer_of_the_older_kind(tmp_path: Path) -> None:
    """Where there is no tokenizer.json, transformers converts what there is; where that fails, the build says so."""
    checkpoint = save_checkpoint("llama3", tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    characters = {chr(0x61 + i): i for i in range(26)} | {"<|endoftext|>": 26}
    (checkpoint / "vocab.json").write_text(json.dumps(characters))
    (checkpoint / "merges.txt").write_text("#version: 0.2\n")
    converted = build(tmp_path / "engine", str(checkpoint))
    assert (converted / "tokenizer.json").is_file()
    (checkpoint / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer cannot be converted"):
        build(tmp_path / "other", str(checkpoint))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format": 99, "versions": {"socket-trt": "9.9"}}, r"built by socket-trt 9.9 in format 99"),
        (lambda m: m | {"format": 0}, "build the engine again"),
        (lambda m: {"hello": 1}, "not a manifest"),
        (lambda m: m | {"max_seq_len": "many"}, "damaged at 'max_seq_len'"),
    ],
)
def test_manifests_that_cannot_be_read(change: object, message: str, tmp_path: Path) -> None:
    manifest = json.loads((tiny_engine() / MANIFEST_FILE).read_text())
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(change(manifest)))  # type: ignore[operator]
    with pytest.raises(EngineError, match=message):
        EngineDirectory.open(tmp_path)


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EngineError, match="not a manifest"):
        EngineDirectory.open(tmp_path)


def test_directories_that_are_no_engines(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such engine directory"):
        EngineDirectory.open(tmp_path / "nowhere")
    with pytest.raises(EngineError, match=r"has no build\.json"):
        EngineDirectory.open(tmp_path)
    shutil.copytree(tiny_engine(), tmp_path / "engine")
    (tmp_path / "engine" / "model.onnx").unlink()
    with pytest.raises(EngineError, match=r"model.onnx: missing"):
        EngineDirectory.open(tmp_path / "engine").check()


def test_the_defaults_of_the_method_are_the_designs() -> None:
    assert SocketConfig().model_dump() == {
        "tables": 60, "planes": 8, "temperature": 0.3, "sink": 128, "window": 128, "budget_tokens": 1024,
        "budget_permille": 50, "min_length": 32768, "selection": 0, "page_size": 128, "seed": 0,
    }  # fmt: skip
