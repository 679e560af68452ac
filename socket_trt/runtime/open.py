"""From an engine directory to something that generates text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tokenizers import Tokenizer

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.engine.profiles import DEFAULT_MAX_STEP_TOKENS
from socket_trt.errors import ConfigError, EngineError
from socket_trt.progress import Progress
from socket_trt.runtime.generator import TextGenerator
from socket_trt.runtime.session import Session


def open_session(
    engine: EngineDirectory,
    num_pages: int | None = None,
    *,
    device: int = 0,
    random_weights: bool = False,
    progress: Progress | None = None,
) -> Session:
    """The session of the backend that the engine was built for.

    num_pages       size of the cache's pool; by default a full batch of full sequences fits
    device          the GPU to run on, for a backend that runs on one
    random_weights  do without the checkpoint (TensorRT)

    Raises EngineError or CheckpointError where graph, plan or weights are not what the build left.
    """
    if engine.manifest.backend == "tensorrt":
        from socket_trt.runtime.tensorrt_session import TensorRTSession

        return TensorRTSession(engine, num_pages, ordinal=device, random_weights=random_weights, progress=progress)
    if random_weights:
        raise ConfigError(f"{engine.path}: only a TensorRT engine can be run with random weights in place of its own")
    from socket_trt.runtime.onnxruntime_session import OnnxRuntimeSession

    return OnnxRuntimeSession(engine, num_pages)


def runs_on_gpu(engine: EngineDirectory) -> bool:
    """Whether the engine's session runs on a GPU, and so may be given one."""
    return engine.manifest.backend == "tensorrt"


def max_step_tokens(engine: EngineDirectory) -> int:
    """Tokens that a step of the engine's session should have at most."""
    plan = engine.manifest.plan
    return plan.max_step_tokens if plan is not None else DEFAULT_MAX_STEP_TOKENS


def load_tokenizer(engine: EngineDirectory) -> Tokenizer:
    """Raises EngineError where the engine has none."""
    path = engine.tokenizer_file
    if not path.is_file():
        raise EngineError(
            f"{engine.path}: has no tokenizer.json, because its checkpoint had none; copy one there to generate text"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise EngineError(f"{path}: not a tokenizer ({error}); copy the checkpoint's there again") from None


@contextlib.contextmanager
def open_generator(engine: EngineDirectory, progress: Progress | None = None) -> Iterator[TextGenerator]:
    """A generator on a session that is closed at the end."""
    tokenizer = load_tokenizer(engine)
    session = open_session(engine, progress=progress)
    try:
        yield TextGenerator(
            session, tokenizer, engine.manifest.model.stop_token_ids, max_step_tokens=max_step_tokens(engine)
        )
    finally:
        session.close()
