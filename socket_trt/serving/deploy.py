"""Entries of a Triton model repository: REPO/NAME/config.pbtxt and REPO/NAME/1/model.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import ConfigError, DeployError
from socket_trt.runtime.open import load_tokenizer, runs_on_gpu
from socket_trt.serving import protocol
from socket_trt.serving.chat import ChatTemplate
from socket_trt.serving.parameters import ModelParameters
from socket_trt.staging import staged

CONFIG_FILE = "config.pbtxt"
MODEL_FILE = "1/model.py"

_MODEL_SOURCE = '''\
"""Written by `socket-trt deploy`; the server's Python needs the package socket-trt."""

from socket_trt.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What `socket-trt deploy` was asked for.

    name        of the model; clients ask for it
    parameters  what the model reads from its configuration
    gpus        GPUs that serve, each with an engine of its own; none: the CPU
    instances   engines on each of them
    """

    name: str
    parameters: ModelParameters
    gpus: tuple[int, ...] = ()
    instances: int = 1


def deploy_engine(engine: EngineDirectory, repository: Path, deployment: Deployment, force: bool = False) -> Path:
    """Write the entry of `engine` and return its directory.

    Raises EngineError or CheckpointError for an engine that would not run, ConfigError for GPUs that its session has no
    use for and for a name that is none, DeployError where the entry cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", deployment.name):
        raise ConfigError(f"--name {deployment.name}: a name has letters, digits, _, - and . only")
    if deployment.gpus and not runs_on_gpu(engine):
        raise ConfigError(f"{engine.path}: runs on the CPU; leave --gpus out")
    if len(set(deployment.gpus)) < len(deployment.gpus):
        raise ConfigError("--gpus: a GPU is given twice; --instances says how many engines each has")
    if not deployment.parameters.random_weights:
        engine.check()
    elif not runs_on_gpu(engine):
        raise ConfigError(f"{engine.path}: only a TensorRT engine can be run with random weights in place of its own")
    if engine.tokenizer_file.is_file():
        load_tokenizer(engine)
    ChatTemplate.of(engine)
    entry = repository / deployment.name
    with staged(entry, force, _is_entry, "no entry that deploy wrote", DeployError) as stage:
        (stage / CONFIG_FILE).write_text(text_format.MessageToString(model_config(deployment)))
        (stage / MODEL_FILE).parent.mkdir()
        (stage / MODEL_FILE).write_text(_MODEL_SOURCE)
    return entry


def model_config(deployment: Deployment) -> pb.ModelConfig:
    """Triton's configuration of the model: decoupled, unbatched for Triton, since the scheduler batches by itself."""
    gpus = {"kind": pb.ModelInstanceGroup.KIND_GPU, "gpus": deployment.gpus}
    cpu = {"kind": pb.ModelInstanceGroup.KIND_CPU}
    return pb.ModelConfig(
        name=deployment.name,
        backend="python",
        max_batch_size=0,
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        input=[
            pb.ModelInput(name=spec.name, data_type=_data_type(spec), dims=spec.dims, optional=True)
            for spec in protocol.INPUTS
        ],
        output=[
            pb.ModelOutput(name=spec.name, data_type=_data_type(spec), dims=spec.dims) for spec in protocol.OUTPUTS
        ],
        instance_group=[pb.ModelInstanceGroup(count=deployment.instances, **gpus if deployment.gpus else cpu)],
        parameters={
            name: pb.ModelParameter(string_value=value) for name, value in deployment.parameters.to_config().items()
        },
    )


def _data_type(spec: protocol.TensorSpec) -> pb.DataType:
    return pb.DataType.Value(f"TYPE_{spec.type}")


def _is_entry(directory: Path) -> bool:
    file = directory / MODEL_FILE
    return file.is_file() and "socket_trt.serving" in file.read_text(errors="replace")
