"""The model that Triton's python backend runs: tensors to requests, answers to responses, metrics to its endpoint."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # in Triton's stub process only, and whole only once a model is made

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import RequestError
from socket_trt.runtime.open import load_tokenizer, max_step_tokens, open_session
from socket_trt.serving import protocol
from socket_trt.serving.chat import ChatTemplate
from socket_trt.serving.loop import ServingLoop
from socket_trt.serving.metrics import Metrics, MetricSpec, Series
from socket_trt.serving.parameters import ModelParameters
from socket_trt.serving.reply import ErrorCode, Piece
from socket_trt.serving.requests import RequestReader

logger = logging.getLogger(__name__)

_CODES = {
    ErrorCode.invalid: "INVALID_ARG",
    ErrorCode.unavailable: "UNAVAILABLE",
    ErrorCode.cancelled: "CANCELLED",
    ErrorCode.internal: "INTERNAL",
}


# From asking a server whose gRPC streams are stuck to end, to ending it: what runs elsewhere in it may finish.  Triton's
# own default of --exit-timeout-secs.
STUCK_EXIT_SECONDS = 30.0


class TritonPythonModel:
    """One instance: an engine on one device, its scheduler and its serving loop.

    Loading it runs steps of the engine, so that Triton says ready only when they have run.
    """

    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(level=logging.INFO, handlers=[_TritonLog()], format="%(name)s: %(message)s")
        config = json.loads(args["model_config"])
        parameters = ModelParameters.create(**{k: v["string_value"] for k, v in config["parameters"].items()})
        device = int(args["model_instance_device_id"])
        engine = EngineDirectory.open(Path(parameters.engine))
        tokenizer = load_tokenizer(engine) if engine.tokenizer_file.is_file() else None
        labels = {
            "model": args["model_name"],
            "version": args["model_version"],
            "instance": args["model_instance_name"],
        }
        self._metrics = Metrics(_TritonExporter(labels))
        self._loop = ServingLoop(
            lambda: self.open_session(
                engine, parameters.num_pages, device=device, random_weights=parameters.random_weights
            ),
            engine.manifest,
            tokenizer,
            self._metrics,
            parameters.loop_options(max_step_tokens(engine)),
            on_broken=_stop_server,
            on_stuck=_replace_server,
        )
        self._reader = RequestReader(tokenizer, engine.manifest.limits(parameters.num_pages), ChatTemplate.of(engine))

    open_session = staticmethod(open_session)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests over; their answers come from the serving loop."""
        for request in requests:
            reply = _TritonReply(request.get_response_sender())
            try:
                tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                self._loop.submit(self._reader.read(tensors, _timeout(request)), reply)
            except (
                Exception
            ) as error:  # not this request's alone to suffer from: Triton would fail all that came with it
                self._loop.submit(error, reply)

    def finalize(self) -> None:
        self._loop.close()
        self._metrics.close()


def _timeout(request: Any) -> float | None:
    """Seconds: the request's `timeout`, which HTTP's generate endpoints hand over as a parameter.  Raises RequestError."""
    microseconds = request.timeout() or json.loads(request.parameters() or "{}").get(protocol.TIMEOUT)
    if microseconds is None:
        return None
    if not isinstance(microseconds, int) or isinstance(microseconds, bool):
        raise RequestError(f"{protocol.TIMEOUT} is {microseconds!r}: expected microseconds, an integer")
    return microseconds / 1e6


class _TritonReply:
    """`reply.Reply` on a response sender."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def send(self, piece: Piece) -> None:
        values = {
            protocol.TEXT_OUTPUT: np.array([piece.text.encode()], np.object_),
            protocol.OUTPUT_IDS: np.array(piece.token_ids, np.int32) if piece.token_ids else None,
            protocol.FINISH_REASON: _optional(piece.finish_reason and piece.finish_reason.encode(), np.object_),
            protocol.NUM_INPUT_TOKENS: _optional(piece.num_input_tokens, np.int32),
            protocol.NUM_OUTPUT_TOKENS: _optional(piece.num_output_tokens, np.int32),
        }
        tensors = [pb_utils.Tensor(name, value) for name, value in values.items() if value is not None]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=_final(piece.final))

    def fail(self, code: ErrorCode, message: str) -> None:
        error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, _CODES[code]))
        self._sender.send(pb_utils.InferenceResponse(error=error), flags=_final(True))

    def cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


def _optional(value: Any, dtype: Any) -> Any:
    return None if value is None else np.array([value], dtype)


def _final(final: bool) -> int:
    return pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0


class _TritonExporter:
    """`metrics.Exporter` on Triton's custom metrics."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._families: dict[MetricSpec, Any] = {}

    def series(self, spec: MetricSpec, labels: Mapping[str, str], buckets: Sequence[float]) -> Series:
        if spec not in self._families:
            kind = getattr(pb_utils.MetricFamily, spec.kind.upper())
            self._families[spec] = pb_utils.MetricFamily(name=spec.name, description=spec.description, kind=kind)
        options = {"buckets": list(buckets)} if buckets else {}
        series: Series = self._families[spec].Metric(labels={**self._labels, **labels}, **options)
        return series

    def close(self) -> None:
        self._families.clear()


class _TritonLog(logging.Handler):
    """Python's log records in Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        log = {logging.ERROR: pb_utils.Logger.log_error, logging.WARNING: pb_utils.Logger.log_warn}
        log.get(min(record.levelno, logging.ERROR), pb_utils.Logger.log_info)(self.format(record))


def _stop_server() -> None:
    """Ask the server, of which the stub process is a child, to end: whoever watches it can then start it again.

    The readiness of a python model does not change while it is loaded, so nothing less tells a load balancer.
    """
    os.kill(os.getppid(), signal.SIGTERM)


def _replace_server() -> None:
    """End a server of which a thread waits for a lock that another one holds, and the other way round.

    Asked to end, it takes no more requests and is no longer ready; but it would then wait for these threads for ever,
    whatever its exit timeout, so that it has to be killed.  (From inside a container that it is the first process of,
    it cannot be.)
    """
    server = os.getppid()
    logger.error("the server is asked to end, and killed in %g s if it has not ended by then", STUCK_EXIT_SECONDS)
    _stop_server()

    def kill() -> None:
        time.sleep(STUCK_EXIT_SECONDS)
        if os.getppid() == server:
            os.kill(server, signal.SIGKILL)
        os._exit(1)  # it could wait for ever for the server to take a line of its log, and keep the GPU's memory

    threading.Thread(target=kill, name="kill", daemon=True).start()
