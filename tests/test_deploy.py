from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import CheckpointError, ConfigError, DeployError, EngineError
from socket_trt.runtime import open as opening
from socket_trt.runtime.open import open_session
from socket_trt.serving import deploy as deploying
from socket_trt.serving import protocol
from socket_trt.serving.deploy import Deployment, deploy_engine
from socket_trt.serving.loop import LoopOptions
from socket_trt.serving.parameters import ModelParameters
from tests.engines import tiny_engine


@pytest.fixture
def engine(tmp_path: Path) -> EngineDirectory:
    shutil.copytree(tiny_engine(), tmp_path / "engine")
    return EngineDirectory.open(tmp_path / "engine")


def read_config(entry: Path) -> pb.ModelConfig:
    return text_format.Parse((entry / "config.pbtxt").read_text(), pb.ModelConfig())


def test_the_entry(engine: EngineDirectory, tmp_path: Path) -> None:
    wanted = ModelParameters(
        engine="/engines/chat", num_pages=100, max_waiting=7, max_seconds=2.5, random_weights=False
    )
    entry = deploy_engine(engine, tmp_path / "models", Deployment("chat", wanted, instances=2))
    assert entry == tmp_path / "models" / "chat"
    files = [path.relative_to(entry).as_posix() for path in entry.rglob("*") if path.is_file()]
    assert sorted(files) == ["1/model.py", "config.pbtxt"]
    config = read_config(entry)
    assert (config.name, config.backend, config.max_batch_size) == ("chat", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert {tensor.name for tensor in config.input} == {spec.name for spec in protocol.INPUTS}
    assert all(tensor.optional for tensor in config.input)
    assert {tensor.name: list(tensor.dims) for tensor in config.output} == {
        "text_output": [1],
        "output_ids": [-1],
        "finish_reason": [1],
        "num_input_tokens": [1],
        "num_output_tokens": [1],
    }
    [group] = config.instance_group
    assert (group.kind, group.count, list(group.gpus)) == (pb.ModelInstanceGroup.KIND_CPU, 2, [])
    read = ModelParameters.create(**{name: value.string_value for name, value in config.parameters.items()})
    assert read == wanted
    assert read.loop_options(512) == LoopOptions(7, 512, 2.5)
    own = ModelParameters.create(engine="x", max_step_tokens="64", random_weights="True")
    assert own.random_weights
    assert own.loop_options(512) == LoopOptions(None, 64, None)


def test_gpus_get_an_engine_each(engine: EngineDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploying, "runs_on_gpu", lambda engine: True)
    parameters = ModelParameters(engine="x")
    entry = deploy_engine(engine, tmp_path / "models", Deployment("big", parameters, gpus=(0, 3)))
    [group] = read_config(entry).instance_group
    assert (group.kind, group.count, list(group.gpus)) == (pb.ModelInstanceGroup.KIND_GPU, 1, [0, 3])
    with pytest.raises(ConfigError, match="a GPU is given twice"):
        deploy_engine(engine, tmp_path / "models", Deployment("twice", parameters, gpus=(1, 1)))


def test_which_engines_run_on_a_gpu(engine: EngineDirectory) -> None:
    assert not opening.runs_on_gpu(engine)
    tensorrt = engine.manifest.model_copy(update={"backend": "tensorrt"})
    assert opening.runs_on_gpu(EngineDirectory(engine.path, tensorrt))


def test_an_entry_is_replaced_only_by_force_and_only_if_deploy_wrote_it(
    engine: EngineDirectory, tmp_path: Path
) -> None:
    deployment = Deployment("model", ModelParameters(engine="x"))
    entry = deploy_engine(engine, tmp_path / "models", deployment)
    with pytest.raises(DeployError, match="exists; give --force"):
        deploy_engine(engine, tmp_path / "models", deployment)
    deploy_engine(engine, tmp_path / "models", deployment, force=True)
    (entry / "1" / "model.py").write_text("class TritonPythonModel: ...")
    with pytest.raises(DeployError, match="is no entry that deploy wrote"):
        deploy_engine(engine, tmp_path / "models", deployment, force=True)
    assert "class TritonPythonModel" in (entry / "1" / "model.py").read_text()
    (tmp_path / "file").touch()
    with pytest.raises(DeployError, match="cannot be written"):
        deploy_engine(engine, tmp_path / "file", deployment)


def test_an_engine_that_would_not_run_is_not_deployed(engine: EngineDirectory, tmp_path: Path) -> None:
    deployment = Deployment("model", ModelParameters(engine="x"))
    (engine.path / "tokenizer_config.json").write_text("{")
    with pytest.raises(EngineError, match="no JSON"):
        deploy_engine(engine, tmp_path / "models", deployment)
    (engine.path / "tokenizer.json").write_text("{")
    with pytest.raises(EngineError, match="not a tokenizer"):
        deploy_engine(engine, tmp_path / "models", deployment)
    (engine.path / "checkpoint" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        deploy_engine(engine, tmp_path / "models", deployment)
    assert not (tmp_path / "models").exists()


def test_random_weights_are_for_engines_that_can_do_without_theirs(
    engine: EngineDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine.path / "checkpoint" / "model.safetensors").unlink()
    deployment = Deployment("model", ModelParameters(engine="x", random_weights=True))
    for attempt in (
        lambda: deploy_engine(engine, tmp_path, deployment),
        lambda: open_session(engine, random_weights=True),
    ):
        with pytest.raises(ConfigError, match="only a TensorRT engine can be run with random weights"):
            attempt()
    monkeypatch.setattr(deploying, "runs_on_gpu", lambda engine: True)
    entry = deploy_engine(engine, tmp_path / "models", deployment)
    assert read_config(entry).parameters["random_weights"].string_value == "True"


def test_an_engine_without_a_tokenizer_may_serve_token_ids(engine: EngineDirectory, tmp_path: Path) -> None:
    (engine.path / "tokenizer.json").unlink()
    assert deploy_engine(engine, tmp_path / "models", Deployment("ids", ModelParameters(engine="x"))).is_dir()
